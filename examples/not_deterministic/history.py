"""Wrong: the collate function draws from a seeded generator of its own, so each draw depends on the draws before it.

The same launch gives the same bits. Another number of loader processes does not, and a resumed run does not either,
because its generator begins anew. `disttrain verify` reports that the samples were the same, but not the loaded data.
"""

from own_generator import WithNoise
from sound import fields

from disttrain import Config

config = Config(**{**fields, "collate": WithNoise(0)})
