"""Moving bytes: bounded executors, circuit breaker, page copies."""
