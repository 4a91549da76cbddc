"""Engines that run in this process: what ``mtgr_baseline`` serves, and what the in-process pipeline calls."""
