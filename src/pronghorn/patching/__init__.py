"""Discover, probe, replace, report: acceleration of one model instance, proven on its modules, undoable."""
