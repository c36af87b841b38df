"""The merge methods: what each requires and accepts, and the recipe that it has for a tensor.

Each family of methods has a file of its own: linear.py, spherical.py, task_vectors.py, model_stock.py.
"""

from __future__ import annotations

from shodh_moe.merging.linear import ccm_recipe, linear_recipe
from shodh_moe.merging.model_stock import model_stock_recipe
from shodh_moe.merging.recipe import Recipe, TensorMerge
from shodh_moe.merging.settings import BY_AXIS, Method
from shodh_moe.merging.spherical import karcher_recipe, slerp_recipe
from shodh_moe.merging.task_vectors import task_vector_recipe

_TASK = ("lambda", "normalize", "weight")
_SPARSE = (*_TASK, "density")
_OWN = ("weight", "density")
# int8_mask saves memory in mergekit and changes no number.
_SINGLE = ("int8_mask", "distance_limit")
_TIES = Method(task_vector_recipe, 0, True, True, False, _SPARSE, _SINGLE, _OWN)
_DARE = Method(task_vector_recipe, 0, True, True, False, _SPARSE, (*_SINGLE, "seed"), _OWN)
_BREADCRUMBS = Method(
    task_vector_recipe, 0, True, True, False, (*_SPARSE, "rescale", "gamma"), _SINGLE, (*_OWN, "gamma")
)
_DELLA = Method(
    task_vector_recipe, 0, True, True, False, (*_SPARSE, "rescale", "epsilon"), (*_SINGLE, "seed"), (*_OWN, "epsilon")
)
# To add a method, write a function from `TensorMerge` to `Recipe` in its family's file and add a line here.
METHODS = {
    # The coordinates of the models determine how many of them ccm combines.
    "ccm": Method(ccm_recipe, 0, False, True, True, ("alpha",), (*BY_AXIS[1:], "distance_limit"), ("coordinate",)),
    "linear": Method(linear_recipe, 0, False, False, False, ("weight", "normalize"), (), ("weight",)),
    "task_arithmetic": Method(task_vector_recipe, 0, True, True, False, _TASK, ("distance_limit",), ("weight",)),
    "ties": _TIES,
    "dare": _DARE,
    "slerp": Method(slerp_recipe, 1, True, True, True, ("t",), (), ()),
    "karcher": Method(karcher_recipe, 0, False, False, False, (), ("max_iter", "tol", "distance_limit"), ()),
    "model_stock": Method(model_stock_recipe, 0, True, True, False, ("filter_wise",), ("distance_limit",), (), least=2),
    "dare_linear": _DARE,
    "dare_ties": _DARE,
    "breadcrumbs": _BREADCRUMBS,
    "breadcrumbs_ties": _BREADCRUMBS,
    "della": _DELLA,
    "della_linear": _DELLA,
}


def recipe(merge: TensorMerge) -> Recipe:
    """How the method of ``merge`` merges its tensor."""
    made: Recipe = METHODS[merge.method].recipe(merge)
    return made
