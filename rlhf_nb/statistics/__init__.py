"""Pure numpy and scipy: intervals, win rates, agreement, accuracy. The package itself loads none."""
