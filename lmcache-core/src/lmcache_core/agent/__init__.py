"""The instance's side of the controller: what it tells, and what it does when told."""
