"""What engines do over a transfer channel: push a prompt's chunks to a decoder, lend chunks."""
