"""Try an idea without a package: a part given as an object.

Here: flow matching whose expert does not train the backbone.
"""

from attrs import evolve

import vla
from vla.layout import gradient_routes

flow = vla.find("head", "flow").load()
idea = evolve(
    flow,
    name="insulated-flow",
    summary="flow matching behind a stop: what the action expert learns stays in it",
    layout=lambda settings, inner: flow.layout(settings, inner).insulated(),
    needs=lambda settings: (
        *flow.needs_of(settings),
        vla.is_true("backbone", "insulates", "the expert looks at the backbone through a stop"),
    ),
)
variant = vla.build(head=idea, preset="tiny")
print(variant.layout())
routes = gradient_routes(variant.layout(), variant.head.offers["losses"])
assert routes == {"actions": {"backbone": False, "action": True, "vision": False}}
print("gradient routes:", routes)
