"""Training of MTGR on user-level samples: ``python -m mtgr.training``."""
