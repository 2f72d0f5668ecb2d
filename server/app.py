"""The server of the Flower app; all of it is in the installed package."""

from fed_dpprune.federation.apps import make_server_app

app = make_server_app()
