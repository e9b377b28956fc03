"""Everything private that the package takes from other libraries, with the versions for which it holds.

One module for each library, so that who needs torch's does not import TRL. A name that a library no longer has is an
ImportError of one line at the import of its module here, and nowhere else later:

- `torch`: modules' hooks, storages' identities, DDP's list of ignored parameters, fake tensors.
- `fsdp`: what torch's FSDP2 takes for the root of a forward.
- `transformers`: the collector of a forward's outputs, what models say about themselves.
- `trl`: the fused LM head and its kernel.
- `lm_eval`: a language model's rank and weights, a task's filters.
- `trainers`: the private methods of transformers' and TRL's trainers that ours override or call.
"""
