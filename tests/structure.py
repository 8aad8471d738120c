"""The rules that sources keep, {path relative to a folder: text of the module}: floors, names, words, docstrings."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name

Sources = Mapping[str, str]

# Top first. Folders in one row stand side by side; "" are the files directly in the package.
FLOORS = (
    ("",),
    ("demo",),
    ("integrations", "convert"),
    ("files",),
    ("optim",),
    ("posthoc",),
    ("sharded",),
    ("sharded/parts",),
    ("average",),
    ("op",),
    ("backends/triton",),
    ("backends", "loop", "strict"),
    ("terms",),
    ("torch_private",),
)
DEPTHS = {folder: depth for depth, floor in enumerate(FLOORS) for folder in floor}
FACES = ("", "demo")  # what may import the root package
WITHOUT_RANKS = ("average", "op", "backends/triton", "backends", "loop", "strict", "terms")

PRIVATE_ATTRIBUTES = {
    *("_modules", "_parameters", "_buffers", "_metadata", "_non_persistent_buffers_set", "_version", "_base"),
    *("_backward_hooks", "_forward_hooks", "_state_dict_hooks", "_local_tensor", "_spec", "_handle", "_fqns"),
    *("_shard_param_infos", "_get_backend", "_inter_node_pg", "_local_shard"),
}
PUBLIC_ALL_THE_SAME = {"torch._foreach_lerp_", "torch._foreach_copy_"}  # documented multi-tensor functions of torch
PRIVATE_IN_TORCH = re.compile(r"torch(?:\.\w+)*?\._(?!_)\w+")
RANKS = re.compile(r"torch\.distributed\b")
# Calls and subscripts that read or write an attribute by its name.
BY_NAME = re.compile(
    r"(__dict__|\bvars\(.*\))(\.\w+)?$|\b((get|set|has|del)attr|attrgetter|__(get|set|del)attr(ibute)?__)$"
)
USERS_FUNCTIONS = ("load",)  # named as users expect it: modules may have such a function of their own
OF_EVERY_FRAMEWORK = {"WeightAverage", "lengths_of"}  # its class in integrations/, and what that asks of it
ASKED_OF_EVERY_BACKEND = {"unavailable", "describe", "serves", "prepare"}


@cache
def parsed(source: str) -> ast.Module:
    """The syntax tree of a module, which the rules only read."""
    return ast.parse(source)


def folder_of(path: str) -> str:
    folder = path.rpartition("/")[0]
    return "demo" if folder.startswith("demo/") else folder


def dotted(path: str) -> str:
    return re.sub(r"(/__init__)?$", "", f"swafast/{path.removesuffix('.py')}").replace("/", ".")


def package_of(path: str) -> str:
    return dotted(f"{path.rpartition('/')[0]}/__init__.py".lstrip("/"))


def full_name(node: ast.AST, bound: Mapping[str, str]) -> str | None:
    """The absolute dotted name behind a chain of attributes, if the chain starts with something imported."""
    if isinstance(node, ast.Attribute):
        start = full_name(node.value, bound)
        return f"{start}.{node.attr}" if start else None
    return bound.get(node.id) if isinstance(node, ast.Name) else None


def string_in(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def imports_in(path: str, nodes: list[ast.AST]) -> Iterator[tuple[str, str, str]]:
    """What each import statement imports, the name it binds for it, and what that name then stands for."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                start = alias.name.partition(".")[0]
                yield alias.name, alias.asname or start, alias.name if alias.asname else start
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package_of(path))
            for alias in node.names:
                yield f"{base}.{alias.name}", alias.asname or alias.name, f"{base}.{alias.name}"


def name_from_call(path: str, node: ast.Call, bound: Mapping[str, str]) -> str | None:
    """What a call of ``import_module``, ``__import__`` or ``getattr`` with a constant string reaches."""
    function = full_name(node.func, bound) or ast.unparse(node.func)
    given: list[ast.AST] = [*node.args, *(keyword.value for keyword in node.keywords)]
    first, second = [*given, ast.Pass(), ast.Pass()][:2]
    if function.endswith(("import_module", "__import__")) and string_in(first):
        return resolve_name(string_in(first) or "", string_in(second) or package_of(path))
    owner = full_name(first, bound)
    return f"{owner}.{string_in(second)}" if function == "getattr" and owner and string_in(second) else None


@cache
def names_in(path: str, source: str) -> frozenset[str]:
    """Every absolute dotted name that a module imports, anywhere in it, or reaches through what it imported.

    A string that is nothing but a dotted name of torch counts too: a key of ``sys.modules`` or an annotation.
    """
    nodes = list(ast.walk(parsed(source)))
    imports = list(imports_in(path, nodes))
    bound = {"torch": "torch", "swafast": "swafast", **{name: meaning for _, name, meaning in imports}}
    names: set[str | None] = {imported for imported, _, _ in imports}
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            names.add(full_name(node, bound))
        elif isinstance(node, ast.Call):
            names.add(name_from_call(path, node, bound))
        elif re.fullmatch(r"torch(\.\w+)+", string_in(node) or ""):
            names.add(string_in(node))
    return frozenset(name for name in names if name)


def imported_modules(path: str, sources: Sources) -> set[str]:
    """The paths of the package's modules that one of them imports, itself left out."""
    modules = {dotted(other): other for other in sources}
    found = set()
    for name in names_in(path, sources[path]):
        module = name  # what is no module is a name in the module, or in the package's __init__, before it
        while module and module not in modules:
            module = module.rpartition(".")[0]
        found.add(modules.get(module, path))
    return found - {path}


def why_not(importer: str, imported: str) -> str | None:
    here, there = folder_of(importer), folder_of(imported)
    if not {here, there} <= DEPTHS.keys():
        return "unknown folder"
    if here == there or DEPTHS[here] < DEPTHS[there] or (imported == "__init__.py" and here in FACES):
        return None
    return "sideways" if DEPTHS[here] == DEPTHS[there] else "up"


def wrong_imports(path: str, sources: Sources) -> list[str]:
    reasons = {other: why_not(path, other) for other in sorted(imported_modules(path, sources))}
    return [f"{path} -> {other}: {reason}" for other, reason in reasons.items() if reason]


def circles(sources: Sources) -> list[str]:
    """The circles of imports; of those that share an import, one."""
    graph = {path: imported_modules(path, sources) for path in sources}
    found = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            *circle, _ = reversed(error.args[1])
            first = circle.index(min(circle))
            circle = [*circle[first:], *circle[:first], circle[first]]
            graph[circle[0]].remove(circle[1])
            found.append(f"circle: {' -> '.join(circle)}")
        else:
            return found


def private_names(path: str, source: str) -> list[str]:
    """What a module outside ``torch_private`` knows of torch's private names."""
    if folder_of(path) == "torch_private":
        return []
    found = {match[0] for name in names_in(path, source) if (match := PRIVATE_IN_TORCH.match(name))}
    found -= PUBLIC_ALL_THE_SAME
    for node in ast.walk(parsed(source)):
        attributes: set[str | None] = set()
        if isinstance(node, ast.Attribute):
            attributes = {node.attr}
        elif isinstance(node, ast.Call) and BY_NAME.search(ast.unparse(node.func)):
            attributes = {string_in(argument) for argument in node.args}
        elif isinstance(node, ast.Subscript) and BY_NAME.search(ast.unparse(node.value)):
            attributes = {string_in(node.slice)}
        elif isinstance(node, ast.Compare) and BY_NAME.search(ast.unparse(node.comparators[-1])):
            attributes = {string_in(node.left)}
        found |= {f".{name}" for name in attributes if name in PRIVATE_ATTRIBUTES}
    return [f"{path}: {name}" for name in sorted(found)]


def names_of_ranks(path: str, source: str) -> list[str]:
    if folder_of(path) not in WITHOUT_RANKS or not any(RANKS.match(name) for name in names_in(path, source)):
        return []
    return [f"{path}: torch.distributed"]


def shared_names(sources: Sources) -> list[str]:
    """The names that two modules outside ``demo`` have, or that two of their classes and public functions have."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted(path for path in sources if folder_of(path) != "demo"):
        places[f"module {path.rpartition('/')[2].removesuffix('.py')}"].append(path)
        excepted = {"main", *USERS_FUNCTIONS, *(ASKED_OF_EVERY_BACKEND if path.startswith("backends/") else ())}
        excepted |= OF_EVERY_FRAMEWORK if path.startswith("integrations/") else set()
        defined = set()
        for node in parsed(sources[path]).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                is_private = node.name.startswith("_") and not isinstance(node, ast.ClassDef)
                defined |= set() if is_private else {node.name} - excepted
        for name in defined:
            places[name].append(path)
    places.pop("module __init__", None)
    return [f"{name}: {', '.join(paths)}" for name, paths in sorted(places.items()) if len(paths) > 1]


@cache
def words_of(name: str) -> tuple[str, ...]:
    """The words of an identifier or of a glossary's entry, in the singular."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return tuple(re.sub(r"(?<!s)s$", "", word.lower()) for word in words)


def glossary_entries(sources: Sources) -> list[str]:
    """The nouns in the glossary: what stands in columns 5 to 22 of its indented lines."""
    docstring = ast.get_docstring(parsed(sources["terms/__init__.py"])) or ""
    return [line[4:22].strip() for line in docstring.splitlines() if re.match(r" {4}\S", line)]


@cache
def identifiers(source: str) -> set[str]:
    nodes = list(ast.walk(parsed(source)))
    return {
        *(node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)),
        *(node.arg for node in nodes if isinstance(node, ast.arg)),
        *(node.attr for node in nodes if isinstance(node, ast.Attribute)),
        *(node.id for node in nodes if isinstance(node, ast.Name)),
    }


def has_words(name: str, entry: tuple[str, ...]) -> bool:
    words = words_of(name)
    return any(words[start : start + len(entry)] == entry for start in range(len(words)))


def wrong_words(sources: Sources) -> list[str]:
    """What is wrong with the glossary: a class has an entry of its name or of its name's last word."""
    entries = [words_of(entry) for entry in glossary_entries(sources)]
    code = {path: source for path, source in sources.items() if folder_of(path) != "demo"}
    found = [f"{' '.join(entry)}: twice" for entry in dict.fromkeys(entries) if entries.count(entry) > 1]
    for path, source in code.items():
        classes = (node.name for node in parsed(source).body if isinstance(node, ast.ClassDef))
        found += [f"{path}: {name}" for name in classes if not {words_of(name), words_of(name)[-1:]} & {*entries}]
    names = set().union(*(identifiers(source) for source in code.values()))
    unused = (entry for entry in entries if not any(has_words(name, entry) for name in names))
    return [*found, *(f"{' '.join(entry)}: not in the code" for entry in unused)]


def listed_modules(page: str) -> list[str]:
    """The modules in the first code block of a page, a tree by indentation; a folder stands for its ``__init__.py``."""
    folders: list[str] = []
    found = []
    for line in page.split("```")[1].strip("\n").splitlines():
        depth, name = len(re.match(" *", line)[0]) // 2, line.split()[0]  # type: ignore[index]
        if name.endswith("/"):
            folders[depth:] = [name]
            name = "__init__.py"
        else:
            del folders[depth:]
        found.append("".join([*folders, name]).removeprefix("swafast/"))
    return found


def wrong_docstrings(sources: Sources) -> list[str]:
    """The docstrings that begin with a word for handing something over, where "Return" is meant."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [
        f"{path}: {docstring.splitlines()[0]}"
        for path, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node))
        if re.match(r"(Gives?|Says?)\b", docstring)
    ]


def shared_blocks(sources: Sources, length: int = 6) -> list[str]:
    """The places of code that repeats another's, from so many lines on, imports and comments left out."""
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path, source in sources.items():
        lines = [(number, line.strip()) for number, line in enumerate(source.splitlines(), 1)]
        code = [(number, line) for number, line in lines if line and not line.startswith(("#", "import ", "from "))]
        for start in range(len(code) - length + 1):
            block = tuple(line for _, line in code[start : start + length])
            if sum(map(len, block)) > 20 * length:  # or brackets, names one to a line
                places[block].append(f"{path}:{code[start][0]}")
    return [", ".join(found) for found in places.values() if len(found) > 1]


def report(sources: Sources) -> list[str]:
    """All that is against the rules in a tree of sources."""
    found = []
    for path, source in sources.items():
        found += [*wrong_imports(path, sources), *private_names(path, source), *names_of_ranks(path, source)]
    return [*found, *circles(sources), *shared_names(sources)]
