"""What scores completions: functions, named or shipped as source, and reward models. One finite number each."""
