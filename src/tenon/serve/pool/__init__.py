"""Several engines, each in a process of its own, behind one front. No torch here."""
