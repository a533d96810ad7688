"""What a call costs: plans before it runs, time and memory of it beside other libraries.

It imports `backends`, `call`, `divergences`, `losses`, `progress_bar`, `schedule` and `user_error`.
"""
