"""What a fleet will take, before anything is loaded: `translora plan`."""
