"""The client of the Flower app; all of it is in the installed package."""

from fed_dpprune.federation.apps import make_client_app

app = make_client_app()
