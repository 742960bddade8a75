"""The parts of bench/peers.py. Files named *_child.py run as scripts in a rival's environment and import nothing of kvkern."""
