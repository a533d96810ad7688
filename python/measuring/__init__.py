"""What a call costs: plans before it runs, time and memory of it beside other libraries. May import `losses`."""
