"""Conversion of checkpoints that the library `adapters` (AdapterHub) has written.

checkpoint.py   reads the files of a checkpoint
methods.py      translates its config, and says what has no counterpart in UniPELT
heads.py        finds the model class of its head, and translates the head's tensors
convert.py      translates the other tensors, and writes the adapter checkpoint
"""
