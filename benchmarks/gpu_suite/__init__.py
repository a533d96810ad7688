"""What only a GPU can show, in seven minutes: right or not, then how fast; nothing that was measured is lost.

`stages` says what is run, in which order and for how long; `runner` runs it, a process for each stage; `journal` keeps every number the
moment it is known; `report` makes a table and a picture of that; `bundle` is what a machine without a network has to bring. `work` is what
the stages do: nothing else here imports torch.
"""
