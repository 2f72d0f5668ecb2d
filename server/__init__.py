"""Where Flower finds the server: app.py. No logic lives here."""
