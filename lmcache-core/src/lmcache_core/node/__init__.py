"""One cache per host: `server.NodeServer` owns it, `client.connect` gives engines a part in it."""
