"""What is asked of a configuration before anything heavy is imported; preflight.py asks it."""
