"""What travels and what is kept: the run spec, the events, the control lines (durable) and the widget messages (not).

Durable formats carry `version` and only ever grow optional fields.
"""
