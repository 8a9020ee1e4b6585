"""See and steer every cache of a fleet: ``lmc controller``."""
