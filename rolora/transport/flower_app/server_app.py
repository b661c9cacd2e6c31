"""Flower's entry on the server: everything is in the installed package."""

from flwr.serverapp import ServerApp

from rolora.run.served import serve

app = ServerApp()


@app.main()
def main(grid, context):
    serve(grid, context.run_config)
