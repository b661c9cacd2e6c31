"""Flower's entry on a node.

Everything is in the installed package and the node's resident worker.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from rolora.transport.flower_bytes import answer

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    return answer(message, context.node_config)


@app.query()
def query(message: Message, context: Context) -> Message:
    return answer(message, context.node_config)
