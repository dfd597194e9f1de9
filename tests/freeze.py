"""The last import of the fork server: a collection in a fork would copy all pages of what was imported before."""

import gc

gc.collect()
gc.freeze()
