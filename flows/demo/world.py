"""The demo's world: a base that speaks in every style, and eight users who each want one."""

from flows.demo.people import Person, write_people
from flows.demo.tiny_base import Plan, make_base

__all__ = ["Person", "Plan", "make_base", "write_people"]
