"""What is measured: the network, its weights and its data. Imports nothing of the other rooms."""
