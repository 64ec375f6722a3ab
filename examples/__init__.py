"""Two small real bases and three procedural tasks: what the demo and the real-model tests run on."""
