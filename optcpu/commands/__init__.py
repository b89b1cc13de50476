"""The commands of ``optcpu``, one file for each: ``add`` its arguments, and run it."""
