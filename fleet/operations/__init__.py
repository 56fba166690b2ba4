"""What the commands do, free of any user interface: the command line, the demo, and whatever comes call the same."""
