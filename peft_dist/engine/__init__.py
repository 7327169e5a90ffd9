"""One replica's control loop: scheduler, adapter residency, engine. No torch."""
