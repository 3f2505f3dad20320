"""An extension of Griffe, which reads the sources for the pages in docs/api: whole signatures of the public functions.

`**options: Unpack[CallOptions]` is replaced by the keywords that the TypedDict declares, with their types and defaults,
as `npo_kernels.call.arguments.checked` does for `help`. Overloads, which differ in `return_stats` alone, are dropped.
"""

from typing import Any

import griffe



class FullSignatures(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if pkg.path != "npo_kernels":
            return
        for function in _functions(pkg):
            function.overloads = []
            if function.parameters and (options := _unpacked(function.parameters[-1])):
                del function.parameters[function.parameters[-1].name]
                for parameter in _keywords(pkg, options):
                    function.parameters.add(parameter)


def _functions(module: griffe.Module) -> list[griffe.Function]:
    found = [member for member in module.members.values() if isinstance(member, griffe.Function)]
    return found + [f for inner in module.members.values() if isinstance(inner, griffe.Module) for f in _functions(inner)]


def _unpacked(parameter: griffe.Parameter) -> str | None:
    """"LossOptions", of `**options: Unpack[LossOptions]`."""
    annotation = parameter.annotation
    if isinstance(annotation, griffe.ExprSubscript) and str(annotation.left) == "Unpack":
        return str(annotation.slice)
    return None


def _keywords(pkg: griffe.Module, options: str) -> list[griffe.Parameter]:
    """Those of the TypedDict and its bases; `name: Annotated[type, Option(default, rule)]` each."""
    keywords = []
    for name, attribute in pkg["call.arguments"][options].attributes.items():
        annotation, option = attribute.annotation.slice.elements
        annotation = str(annotation).strip("\"'")  # one is a string, for torch without a distributed package
        keywords.append(
            griffe.Parameter(
                name,
                annotation=annotation,
                kind=griffe.ParameterKind.keyword_only,
                default=str(option.arguments[0]),
            )
        )
    return keywords
