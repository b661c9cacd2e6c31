"""Flower's entry on the server: everything is in the installed package."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from rolora.run.served import serve
from rolora.transport.flower_pulls import hasten

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    hasten()
    serve(grid, context.run_config)
