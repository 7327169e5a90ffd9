"""The paper's figures, each by one command, in the simulator or against a live server."""
