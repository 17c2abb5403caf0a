from hypothesis import settings

# Busy machines stall for longer than any single example should take.
settings.register_profile("patient", deadline=None, max_examples=50)
settings.load_profile("patient")
