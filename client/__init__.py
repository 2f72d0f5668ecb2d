"""Where Flower finds the client: app.py. No logic lives here."""
