"""An extension of Griffe, which reads the sources for the pages in docs/api.

- Whole signatures of the public functions: `**options: Unpack[CallOptions]` is replaced by the keywords that the
  TypedDict declares, with their types and defaults, as `npo_kernels.call.arguments.checked` does for `help`. Overloads,
  which differ in `return_stats` alone, are dropped.
- The options of dataclasses: what `Annotated[type, "help"]` has for the command line is the description of the field.
"""

import ast
from typing import Any

import griffe


class FullSignatures(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        for function in _functions(pkg) if pkg.path == "npo_kernels" else []:
            function.overloads = []
            options = _unpacked(function.parameters[-1]) if len(function.parameters) else None
            if options:
                del function.parameters[function.parameters[-1].name]
                for parameter in _keywords(pkg, options):
                    function.parameters.add(parameter)
            for parameter in function.parameters:
                parameter.annotation = _spelled_out(pkg, parameter.annotation)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Describe the fields in an `Args` section; a table of these has the defaults as well."""
        described = []
        for attribute in cls.members.values():
            annotation = getattr(attribute, "annotation", None)
            if isinstance(annotation, griffe.ExprSubscript) and str(annotation.left) == "Annotated":
                attribute.annotation, text = annotation.slice.elements
                if isinstance(text, str):
                    _plain_parameter(cls, attribute)
                    described.append(f"    {attribute.name}: {ast.literal_eval(text)}")
        if described and cls.docstring:
            cls.docstring.value += "\n\nArgs:\n" + "\n".join(described)


def _plain_parameter(cls: griffe.Class, attribute: Any) -> None:
    """The parameter of a dataclass, made from the field before its annotation was taken apart."""
    made = cls.members.get("__init__")
    if isinstance(made, griffe.Function) and attribute.name in made.parameters:
        made.parameters[attribute.name].annotation = attribute.annotation


def _functions(module: griffe.Module) -> list[griffe.Function]:
    found = [member for member in module.members.values() if isinstance(member, griffe.Function)]
    return found + [
        f for inner in module.members.values() if isinstance(inner, griffe.Module) for f in _functions(inner)
    ]


def _unpacked(parameter: griffe.Parameter) -> str | None:
    """ "LossOptions", of `**options: Unpack[LossOptions]`."""
    annotation = parameter.annotation
    if isinstance(annotation, griffe.ExprSubscript) and str(annotation.left) == "Unpack":
        return str(annotation.slice)
    return None


def _keywords(pkg: griffe.Module, options: str) -> list[griffe.Parameter]:
    """Those of the TypedDict and its bases; `name: Annotated[type, Option(default, rule)]` each."""
    keywords = []
    for name, attribute in pkg["call.arguments"][options].attributes.items():
        annotation, option = attribute.annotation.slice.elements
        default = _literal(option.arguments[0])
        kind = griffe.ParameterKind.keyword_only
        keywords.append(griffe.Parameter(name, annotation=annotation, kind=kind, default=default))
    return keywords


def _literal(default: Any) -> Any:
    """A string in quotes: Griffe takes a string in an annotation for a name."""
    return f'"{default}"' if isinstance(default, griffe.ExprName) else default


def _spelled_out(pkg: griffe.Module, annotation: Any) -> Any:
    """`Literal["mean", "sum", "none"]` for `Reduction`: what an alias of the package stands for."""
    if not isinstance(annotation, griffe.ExprName) or not annotation.canonical_path.startswith("npo_kernels."):
        return annotation
    named = pkg[annotation.canonical_path.removeprefix("npo_kernels.")]
    found = named.value if isinstance(named, griffe.Attribute) else None
    return found if isinstance(found, griffe.ExprSubscript) else annotation
