"""`fed-dpprune export-app DIR`: the Flower app folder for a user who has the package installed and no checkout.

The folder holds configuration and two entry points; the code comes from the installed package on every node, so that the
operator of a node chooses the code that holds the budget. The same `[tool.flwr.app]` tables stand in this project's own
pyproject.toml, for `flwr run .` in a checkout; a test keeps them equal to `app_tables`.
"""

from __future__ import annotations

from pathlib import Path

import tomli_w

import fed_dpprune
from fed_dpprune import config as cfg
from fed_dpprune.errors import BadInput

APP_NAME = "fed-dpprune-app"
PUBLISHER = "fed-dpprune"
QUICKSTART = "quickstart.toml"

# Flower's static check wants a plain assignment in the module that the component names.
ENTRY = '''"""The {side} of the Flower app; all of it is in the installed package."""

from fed_dpprune.federation.apps import make_{side}_app

app = make_{side}_app()
'''
ROOM = '"""Where Flower finds the {side}: app.py. No logic lives here."""\n'

HEADER = """# Flower app: federated training in which every update is private and sparse.
#
# On every machine that takes part: the package fed-dpprune {version}. One simulation, all on this machine:
#
#   flower-superlink --insecure --simulation --host 127.0.0.1 --port 8000 --disable-runtime-dependency-installation
#
# and, with address = "127.0.0.1:8000" and insecure = true as connection "sim" in Flower's own config.toml, from here:
#
#   flwr run . sim --stream --federation-config 'num-supernodes={clients} client-resources-num-cpus=1'
#
# Keys of [tool.flwr.app.config] are those of fed-dpprune's configs; change them here or with --run-config.
"""


def app_tables(config: cfg.Config) -> str:
    """The `[tool.flwr.app]` tables as TOML text; the run-config holds every key of `config`."""
    run_config = "".join(f"{key} = {_value(value)}\n" for key, value in cfg.to_run_config(config).items())
    return f"""[tool.flwr.app]
publisher = "{PUBLISHER}"
fab-include = ["server/*.py", "client/*.py", "configs/*.toml"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
{run_config}"""


def _value(value: bool | int | float | str) -> str:
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def configs_dir() -> Path:
    """Where the configs are: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(fed_dpprune.__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def entry(side: str) -> str:
    """The text of `<side>/app.py`; `side` is "server" or "client"."""
    return ENTRY.format(side=side)


def room(side: str) -> str:
    """The text of `<side>/__init__.py`."""
    return ROOM.format(side=side)


def _pyproject(config: cfg.Config) -> str:
    version = fed_dpprune.__version__
    return f"""{HEADER.format(version=version, clients=config.federation.clients)}
[project]
name = "{APP_NAME}"
version = "{version}"
description = "Federated training in which every update is private and sparse"
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = ["fed-dpprune=={version}"]

{app_tables(config)}"""


def write(folder: Path, *, config_file: Path | None = None) -> list[Path]:
    """Write the app folder and return the files written, pyproject.toml first.

    Args:
        folder: New or empty.
        config_file: Whose values become the defaults; the quickstart's if not given.

    Raises:
        BadInput: `folder` is a file or not empty, or cannot be written. Nothing is written then.
        ConfigError: The config file is not one.
    """
    source = config_file or configs_dir() / QUICKSTART
    config = cfg.load(source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(str(folder), "is not an empty folder", "name a new one")
    files = {"pyproject.toml": _pyproject(config), f"configs/{source.name}": source.read_text(encoding="utf-8")}
    for side in ("server", "client"):
        files |= {f"{side}/__init__.py": room(side), f"{side}/app.py": entry(side)}
    try:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(str(folder), f"cannot be written ({error.strerror})", "name another folder") from None
    return [folder / name for name in files]
