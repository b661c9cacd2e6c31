"""Flower's entry on a node.

Everything is in the installed package and the node's resident worker.
"""

from flwr.clientapp import ClientApp

from rolora.transport.flower import answer

app = ClientApp()


@app.train()
def train(message, context):
    return answer(message, context.node_config)


@app.query()
def query(message, context):
    return answer(message, context.node_config)
