"""Foreign checkpoints: public formats, and networks with their exact semantics behind the project's engine signatures.

``tensors`` reads files without running code in them, ``formats`` recognises and converts what they hold, and
``research``, ``stu`` and ``nvidia`` are the networks. ``mtgr.loading`` is the way in.
"""
