"""Training runs from the command line: texts, models, the loop, checkpoints, reports, the demo. May import all but `command_line`."""
