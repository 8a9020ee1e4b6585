"""The host tier, any connector as a tier, and their order."""
