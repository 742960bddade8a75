"""The parts of bench/peers.py. Files named *_child.py run as scripts in a rival's environment and import nothing of kvkern.

engine_child.py loads kvkern/demo/standalone_engine.py by its path; that file needs only the standard library and vLLM.
library_kvkern_child.py imports kvkern, because kvkern is the library that it measures.
"""
