"""AI feedback: chat models behind one interface, what they say as verdicts, and the constitutions they are held to."""
