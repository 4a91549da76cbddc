"""Models that MTGR is compared with, and MTGR without one of its parts, all trained and scored in one harness."""
