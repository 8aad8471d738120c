// One pass over module trees: does every tensor still stand where it stood when an update was planned?
//
// Functions for Python, in its stable interface, so that one file serves every version. Tensors are read through the C
// functions that torch exports for compiled code. This is a library of its own: the kernels know no Python.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

namespace {

// Torch's at::Tensor*. A Python tensor holds the at::Tensor itself, at an offset that the caller has found.
using Handle = void*;

struct Torch {
  int32_t (*data)(Handle, void**);
  int32_t (*dim)(Handle, int64_t*);
  int32_t (*sizes)(Handle, int64_t**);
  int32_t (*strides)(Handle, int64_t**);
  int32_t (*dtype)(Handle, int32_t*);
  int32_t (*device_type)(Handle, int32_t*);
  int32_t (*device_index)(Handle, int32_t*);
  // These are of C++, by their mangled names. They take a reference, which is passed as a pointer.
  bool (*is_neg)(Handle);
  bool (*is_conj)(Handle);
  void (*bump_version)(Handle);
  Py_ssize_t offset;
};
Torch torch;

struct Function {
  const char* name;
  void** address;
};
const Function FUNCTIONS[] = {
    {"aoti_torch_get_data_ptr", reinterpret_cast<void**>(&torch.data)},
    {"aoti_torch_get_dim", reinterpret_cast<void**>(&torch.dim)},
    {"aoti_torch_get_sizes", reinterpret_cast<void**>(&torch.sizes)},
    {"aoti_torch_get_strides", reinterpret_cast<void**>(&torch.strides)},
    {"aoti_torch_get_dtype", reinterpret_cast<void**>(&torch.dtype)},
    {"aoti_torch_get_device_type", reinterpret_cast<void**>(&torch.device_type)},
    {"aoti_torch_get_device_index", reinterpret_cast<void**>(&torch.device_index)},
    {"_ZN2at6native6is_negERKNS_6TensorE", reinterpret_cast<void**>(&torch.is_neg)},
    {"_ZN2at6native7is_conjERKNS_6TensorE", reinterpret_cast<void**>(&torch.is_conj)},
    {"_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", reinterpret_cast<void**>(&torch.bump_version)},
};

Handle handle_of(PyObject* tensor) { return reinterpret_cast<char*>(tensor) + torch.offset; }
void* impl_of(PyObject* tensor) { return *static_cast<void**>(handle_of(tensor)); }

// What a launch depends on, besides sizes and strides.
struct View {
  void* data;
  // Small, since a pass reads thousands: torch has 64 dims at most, and few dtypes and kinds of device.
  int16_t device_index;
  uint8_t dim, dtype, device_type;
  bool is_neg, is_conj;

  bool operator==(const View& other) const {
    return data == other.data && dim == other.dim && dtype == other.dtype && device_type == other.device_type &&
           device_index == other.device_index && is_neg == other.is_neg && is_conj == other.is_conj;
  }
};

// Returns false for a tensor without memory of its own, such as a sparse one.
bool read(PyObject* tensor, View* view) {
  const Handle handle = handle_of(tensor);
  int64_t dim;
  int32_t dtype, device_type, device_index;
  if (torch.data(handle, &view->data) || torch.dim(handle, &dim) || torch.dtype(handle, &dtype) ||
      torch.device_type(handle, &device_type) || torch.device_index(handle, &device_index)) {
    return false;
  }
  view->dim = dim;
  view->dtype = dtype;
  view->device_type = device_type;
  view->device_index = device_index;
  if (view->dim != dim || view->dtype != dtype || view->device_type != device_type ||
      view->device_index != device_index) {
    return false;
  }
  view->is_neg = torch.is_neg(handle);
  view->is_conj = torch.is_conj(handle);
  return true;
}

// A nested tensor has none, and some versions of torch print an error then: ask once the view is the expected one.
bool read_geometry(PyObject* tensor, int64_t** sizes, int64_t** strides) {
  const Handle handle = handle_of(tensor);
  return !torch.sizes(handle, sizes) && !torch.strides(handle, strides);
}

void bump_version(PyObject* tensor) {
  try {
    torch.bump_version(handle_of(tensor));
  } catch (...) {  // made under inference mode: it has no version, and autograd never saves it
  }
}

enum Attribute { PARAMETERS, BUFFERS, CHILDREN, NUM_ATTRIBUTES };
const char* const ATTRIBUTE_NAMES[] = {"_parameters", "_buffers", "_modules"};
size_t dict_words;             // of a dict's own record
PyTypeObject* plain_types[2];  // torch.Tensor and Parameter

bool is_plain(PyObject* tensor) { return Py_TYPE(tensor) == plain_types[0] || Py_TYPE(tensor) == plain_types[1]; }

// How an entry of a module's dict is compared.
enum class Kind : uint8_t {
  TENSOR,   // its type and its view
  SHARD,    // a DTensor: its type, its spec by identity, and the view of its local tensor
  ANY,      // by nothing: no plan uses it
  NOTHING,  // it must be None
  CHILD,    // a module, by identity
};

struct Entry {
  PyObject* key;
  PyTypeObject* type;
  View view;
  PyObject* identity;  // of a CHILD, or the spec of a SHARD
  uint32_t geometry;   // where its sizes and then its strides stand
  int32_t tie;         // the first entry with the same tensor, or -1
  Kind kind;
};

struct Module {
  PyObject* reference;  // a weak one, of a root only: a parent holds the others
  PyTypeObject* type;
  PyObject* keys[NUM_ATTRIBUTES];      // of its three dicts in its own dict: not interned in an unpickled module
  uint32_t positions[NUM_ATTRIBUTES];  // and where they stand there
  uint32_t place;                      // the entry that holds the module, if it is no root
  uint32_t counts[NUM_ATTRIBUTES];
};

// Everything is in the order of the pass, which so reads memory from front to back. Keys, types, specs and
// weak references are borrowed: `make` hands them to its caller, who keeps them where Python's garbage collector sees
// them. A child is known by its address alone; all that is below it is compared.
struct Trees {
  std::vector<Module> modules;
  std::vector<Entry> entries;
  std::vector<int64_t> geometry;
  // Cache lines that the pass will read. After a large update they are no longer in the caches.
  std::vector<const char*> lines;
  std::vector<uint32_t> line_ends;  // of each module and each entry
  std::vector<std::vector<size_t>> groups;
  // Of each entry, valid in the pass that has put it there.
  std::vector<PyObject*> values, tensors;
  Py_ssize_t local_slot, spec_slot;  // where a DTensor holds both
};

constexpr const char* CAPSULE = "swafast.trees";
constexpr uintptr_t LINE = 64;
constexpr size_t AHEAD = 12;  // modules and entries; 8 to 24 are alike

class Prefetch {
 public:
  explicit Prefetch(const Trees& trees) : trees_(trees) {}

  void next() {
    const size_t last = trees_.line_ends.size() - 1;
    const size_t end = trees_.line_ends[std::min(unit_++ + AHEAD, last)];
    for (; line_ < end; line_++) __builtin_prefetch(trees_.lines[line_]);
  }

 private:
  const Trees& trees_;
  size_t unit_ = 0, line_ = 0;
};

// Returns a module's or a tensor's own dict, borrowed, or null.
PyObject* own_dict(PyObject* object) {
  PyObject* own = PyObject_GenericGetDict(object, nullptr);
  if (own == nullptr) {
    PyErr_Clear();
  } else {
    Py_DECREF(own);  // the object holds it
  }
  return own;
}

// By identity: a look-up could run a key's own __eq__.
PyObject* attribute(PyObject* own, const Module& module, int which) {
  Py_ssize_t position = module.positions[which];
  PyObject *key, *value;
  if (PyDict_Next(own, &position, &key, &value) && key == module.keys[which]) return value;
  position = 0;
  while (PyDict_Next(own, &position, &key, &value)) {
    if (key == module.keys[which]) return value;
  }
  return nullptr;
}

bool tensor_stands(const Trees& trees, const Entry& entry, PyObject* tensor) {
  View view;
  int64_t *sizes, *strides;
  if (!read(tensor, &view) || !(view == entry.view) || !read_geometry(tensor, &sizes, &strides)) return false;
  const int64_t* expected = trees.geometry.data() + entry.geometry;
  for (int64_t dim = 0; dim < view.dim; dim++) {
    if (sizes[dim] != expected[dim] || strides[dim] != expected[view.dim + dim]) return false;
  }
  return true;
}

// What an object holds in a slot, borrowed, or null.
PyObject* in_slot(PyObject* object, Py_ssize_t offset) {
  PyObject* held;
  std::memcpy(&held, reinterpret_cast<char*>(object) + offset, sizeof(held));
  return held;
}

bool entry_stands(Trees& trees, size_t index, PyObject* value) {
  const Entry& entry = trees.entries[index];
  trees.values[index] = value;
  if (entry.kind == Kind::CHILD) return value == entry.identity;
  if (entry.tie >= 0) {
    trees.tensors[index] = trees.tensors[entry.tie];
    return value == trees.values[entry.tie];
  }
  if (entry.kind == Kind::ANY) return true;
  if (Py_TYPE(value) != entry.type) return false;
  if (entry.kind == Kind::NOTHING) return true;
  if (entry.kind == Kind::SHARD) {
    if (in_slot(value, trees.spec_slot) != entry.identity) return false;
    value = in_slot(value, trees.local_slot);
    if (value == nullptr || !is_plain(value)) return false;
  }
  trees.tensors[index] = value;
  return tensor_stands(trees, entry, value);
}

// Runs no Python code, so that nobody can change the trees meanwhile.
bool stands(Trees& trees) {
  Prefetch prefetch(trees);
  size_t index = 0;
  for (const Module& module : trees.modules) {
    prefetch.next();
    PyObject* object = module.reference != nullptr ? PyWeakref_GetObject(module.reference) : trees.values[module.place];
    if (Py_TYPE(object) != module.type) return false;
    PyObject* own = own_dict(object);
    if (own == nullptr) return false;
    for (int which = 0; which < NUM_ATTRIBUTES; which++) {
      PyObject* dict = attribute(own, module, which);
      if (dict == nullptr || !PyDict_CheckExact(dict)) return false;
      if (size_t(PyDict_Size(dict)) != module.counts[which]) return false;
      Py_ssize_t position = 0;
      for (uint32_t i = 0; i < module.counts[which]; i++, index++) {
        prefetch.next();
        PyObject *key, *value;
        if (!PyDict_Next(dict, &position, &key, &value) || key != trees.entries[index].key) return false;
        if (!entry_stands(trees, index, value)) return false;
      }
    }
  }
  return true;
}

// Making

// Collects what a pass goes by. Its errors are Python's: a null or false result has set one.
class Maker {
 public:
  Maker(PyObject* kept, PyObject* shard_type, Py_ssize_t local_slot, Py_ssize_t spec_slot)
      : trees_(new Trees), kept_(kept), shard_type_(shard_type) {
    trees_->local_slot = local_slot;
    trees_->spec_slot = spec_slot;
  }

  bool add_groups(PyObject* groups) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(groups); i++) {
      PyObject* group = PyTuple_GetItem(groups, i);
      for (Py_ssize_t j = 0; j < PyList_Size(group); j++) used_[PyList_GetItem(group, j)] = -1;
    }
    return true;
  }

  bool add_module(PyObject* module, PyObject* reference) {
    Module made = {};
    made.type = Py_TYPE(module);
    if (!keep(reinterpret_cast<PyObject*>(made.type))) return false;
    if (reference != Py_None) {
      made.reference = reference;
      if (!keep(reference)) return false;
    } else if (auto found = places_.find(module); found != places_.end()) {
      made.place = found->second;
    } else {
      return refuse("a module that no module before it holds");
    }
    PyObject* own = own_dict(module);
    if (own == nullptr || !PyDict_CheckExact(own)) return refuse("a module without a dict of its own");
    expect_object(module);
    if (made.reference != nullptr) expect_object(reference);
    expect_dict(own);
    end_of_unit();
    for (int which = 0; which < NUM_ATTRIBUTES; which++) {
      PyObject* dict = find_attribute(own, &made, which);
      if (dict == nullptr || !PyDict_CheckExact(dict) || !is_attribute(module, ATTRIBUTE_NAMES[which], dict)) {
        return refuse("a module that keeps its tensors elsewhere");
      }
      if (!keep(made.keys[which])) return false;
      made.counts[which] = PyDict_Size(dict);
      expect_dict(dict);
      Py_ssize_t position = 0;
      PyObject *key, *value;
      while (PyDict_Next(dict, &position, &key, &value)) {
        if (!add_entry(which, key, value)) return false;
        end_of_unit();
      }
    }
    trees_->modules.push_back(made);
    return true;
  }

  bool find_groups(PyObject* groups) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(groups); i++) {
      PyObject* group = PyTuple_GetItem(groups, i);
      std::vector<size_t>& found = trees_->groups.emplace_back();
      for (Py_ssize_t j = 0; j < PyList_Size(group); j++) {
        const int64_t entry = used_[PyList_GetItem(group, j)];
        if (entry < 0) return refuse("a tensor that is in no module");
        found.push_back(entry);
      }
    }
    return true;
  }

  std::unique_ptr<Trees> result() {
    trees_->values.resize(trees_->entries.size());
    trees_->tensors.resize(trees_->entries.size());
    return std::move(trees_);
  }

 private:
  static bool refuse(const char* what) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, what);
    return false;
  }

  bool keep(PyObject* object) { return PyList_Append(kept_, object) == 0; }

  static bool is_attribute(PyObject* object, const char* name, PyObject* value) {
    PyObject* got = PyObject_GetAttrString(object, name);
    Py_XDECREF(got);
    if (got == nullptr && PyErr_ExceptionMatches(PyExc_AttributeError)) PyErr_Clear();
    return got != nullptr && got == value;
  }

  // Finds a module's dict in its own dict, with its key and position.
  static PyObject* find_attribute(PyObject* own, Module* made, int which) {
    Py_ssize_t position = 0, before = 0;
    PyObject *key, *value;
    for (; PyDict_Next(own, &position, &key, &value); before = position) {
      if (!PyUnicode_CheckExact(key) || PyUnicode_CompareWithASCIIString(key, ATTRIBUTE_NAMES[which]) != 0) continue;
      made->keys[which] = key;
      made->positions[which] = before;
      return value;
    }
    return nullptr;
  }

  bool add_entry(int which, PyObject* key, PyObject* value) {
    const size_t index = trees_->entries.size();
    Entry made = {};
    made.key = key;
    made.type = Py_TYPE(value);
    made.tie = -1;
    if (!keep(key) || !keep(reinterpret_cast<PyObject*>(made.type))) return false;
    auto used = used_.find(value);
    if (value == Py_None) {
      made.kind = Kind::NOTHING;
    } else if (which == CHILDREN) {
      made.kind = Kind::CHILD;
      made.identity = value;
      places_.emplace(value, index);
    } else if (auto [first, is_new] = firsts_.emplace(value, index); !is_new) {
      made.kind = Kind::ANY;
      made.tie = static_cast<int32_t>(first->second);
    } else if (used == used_.end()) {
      made.kind = Kind::ANY;
    } else {
      used->second = index;
      if (!add_tensor(&made, value)) return false;
    }
    trees_->entries.push_back(made);
    return true;
  }

  bool add_tensor(Entry* made, PyObject* value) {
    made->kind = Kind::TENSOR;
    expect_object(value);
    PyObject* tensor = value;
    if (made->type == reinterpret_cast<PyTypeObject*>(shard_type_)) {
      made->kind = Kind::SHARD;
      tensor = in_slot(value, trees_->local_slot);
      made->identity = in_slot(value, trees_->spec_slot);
      if (!is_attribute(value, "_local_tensor", tensor) || !is_attribute(value, "_spec", made->identity)) {
        return refuse("a DTensor that has its parts elsewhere");
      }
      if (!keep(made->identity)) return false;
      expect(value, std::max(trees_->local_slot, trees_->spec_slot) + sizeof(PyObject*));
      expect_object(tensor);
    }
    if (!is_plain(tensor)) return refuse("a tensor of a subclass");
    int64_t *sizes, *strides;
    if (!read(tensor, &made->view) || !read_geometry(tensor, &sizes, &strides)) {
      return refuse("a tensor without memory of its own");
    }
    expect_impl(tensor);
    std::vector<int64_t>& geometry = trees_->geometry;
    made->geometry = geometry.size();
    geometry.insert(geometry.end(), sizes, sizes + made->view.dim);
    geometry.insert(geometry.end(), strides, strides + made->view.dim);
    return true;
  }

  // The cache lines of a pass. An address that is stale by then does no harm: a prefetch cannot fault.

  void expect(const void* start, size_t nbytes) {
    const char* first = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(start) & ~(LINE - 1));
    for (const char* line = first; line < static_cast<const char*>(start) + nbytes; line += LINE) {
      trees_->lines.push_back(line);
    }
  }

  // What an object's words point to, such as a dict's table of keys.
  void expect_pointers(const void* object, size_t first, size_t end, size_t nbytes) {
    for (size_t i = first; i < end; i++) {
      uintptr_t word;
      std::memcpy(&word, static_cast<const char*>(object) + i * sizeof(word), sizeof(word));
      if (word > 0xFFFF && word % alignof(void*) == 0) expect(reinterpret_cast<const void*>(word), nbytes);
    }
  }

  void expect_object(PyObject* object) { expect(object, 48); }

  void expect_dict(PyObject* dict) {
    expect(dict, 48);
    expect_pointers(dict, 3, dict_words, PyDict_Size(dict) != 0 ? 64 + 24 * std::min<size_t>(PyDict_Size(dict), 8) : 0);
  }

  void expect_impl(PyObject* tensor) {
    expect(impl_of(tensor), 192);
    expect_pointers(impl_of(tensor), 2, 6, 64);  // its storage and its version
  }

  void end_of_unit() { trees_->line_ends.push_back(trees_->lines.size()); }

  std::unique_ptr<Trees> trees_;
  PyObject *kept_, *shard_type_;
  std::unordered_map<PyObject*, int64_t> used_;   // the tensors of all groups, and their entries
  std::unordered_map<PyObject*, size_t> firsts_;  // the first entry of each tensor
  std::unordered_map<PyObject*, size_t> places_;  // and of each module
};

// Not Py_RETURN_NONE: in some versions of Python's headers it takes no reference, which Python 3.10 and 3.11 need.
PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

void destroy(PyObject* capsule) { delete static_cast<Trees*>(PyCapsule_GetPointer(capsule, CAPSULE)); }

// make(modules, references, groups, shard_type, local_slot, spec_slot) -> (trees, kept)
PyObject* make(PyObject*, PyObject* args) {
  PyObject *modules, *references, *groups, *shard_type;
  Py_ssize_t local_slot, spec_slot;
  if (!PyArg_ParseTuple(args, "OOOOnn", &modules, &references, &groups, &shard_type, &local_slot, &spec_slot)) {
    return nullptr;
  }
  if (!PyList_Check(modules) || !PyList_Check(references) || PyList_Size(modules) != PyList_Size(references) ||
      !PyTuple_Check(groups)) {
    PyErr_SetString(PyExc_TypeError, "make(modules, references, groups, shard_type, local_slot, spec_slot)");
    return nullptr;
  }
  PyObject* kept = PyList_New(0);
  PyObject* capsule = nullptr;
  if (kept == nullptr) return nullptr;
  try {
    Maker maker(kept, shard_type, local_slot, spec_slot);
    bool is_made = maker.add_groups(groups);
    for (Py_ssize_t i = 0; is_made && i < PyList_Size(modules); i++) {
      is_made = maker.add_module(PyList_GetItem(modules, i), PyList_GetItem(references, i));
    }
    if (is_made && maker.find_groups(groups) && !PyErr_Occurred()) {
      std::unique_ptr<Trees> trees = maker.result();
      capsule = PyCapsule_New(trees.get(), CAPSULE, destroy);
      if (capsule != nullptr) trees.release();
    }
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  PyObject* result = capsule != nullptr ? PyTuple_Pack(2, capsule, kept) : nullptr;
  Py_XDECREF(capsule);
  Py_DECREF(kept);
  return result;
}

Trees* trees_in(PyObject* capsule) { return static_cast<Trees*>(PyCapsule_GetPointer(capsule, CAPSULE)); }

// find(trees, count) -> the tensors of the first groups, each in a list, or None if not all of the trees stand. Of a
// DTensor it is the local tensor.
PyObject* find(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
  Trees* trees = num_args == 2 ? trees_in(args[0]) : nullptr;
  const Py_ssize_t count = trees != nullptr ? PyLong_AsSsize_t(args[1]) : -1;
  if (PyErr_Occurred()) return nullptr;
  if (count < 0 || size_t(count) > trees->groups.size()) return PyErr_Format(PyExc_TypeError, "find(trees, count)");
  // First: an allocation may run the garbage collector, and that runs anything.
  PyObject* found = PyTuple_New(count);
  for (Py_ssize_t i = 0; found != nullptr && i < count; i++) {
    PyObject* group = PyList_New(trees->groups[i].size());
    if (group == nullptr) Py_CLEAR(found);
    if (group != nullptr) PyTuple_SetItem(found, i, group);
  }
  if (found == nullptr) return nullptr;
  const int was_enabled = PyGC_Disable();  // the pass makes a dict for a module that has lost its own
  const bool is_found = stands(*trees);
  if (was_enabled) PyGC_Enable();
  for (Py_ssize_t i = 0; is_found && i < count; i++) {
    PyObject* group = PyTuple_GetItem(found, i);
    Py_ssize_t place = 0;
    for (size_t entry : trees->groups[i]) {
      PyObject* tensor = trees->tensors[entry];
      Py_INCREF(tensor);  // the list has it: nobody can free what a kernel is about to use
      PyList_SetItem(group, place++, tensor);
    }
  }
  if (is_found) return found;
  Py_DECREF(found);
  return none();
}

// tell(tensors) -> whether autograd knows that all tensors of a list or tuple are written. A subclass may not be told.
PyObject* tell(PyObject*, PyObject* tensors) {
  const bool is_list = PyList_Check(tensors);
  if (!is_list && !PyTuple_Check(tensors)) return PyBool_FromLong(0);
  const Py_ssize_t count = is_list ? PyList_Size(tensors) : PyTuple_Size(tensors);
  auto item = is_list ? PyList_GetItem : PyTuple_GetItem;
  for (Py_ssize_t i = 0; i < count; i++) {
    if (!is_plain(item(tensors, i))) return PyBool_FromLong(0);
  }
  for (Py_ssize_t i = 0; i < count; i++) bump_version(item(tensors, i));
  return PyBool_FromLong(1);
}

PyObject* tuple_of(const int64_t* values, int64_t count) {
  PyObject* made = PyTuple_New(count);
  for (int64_t i = 0; made != nullptr && i < count; i++) PyTuple_SetItem(made, i, PyLong_FromLongLong(values[i]));
  return made;
}

// read(tensor, impl) -> what a pass would read of it, or None. impl is the address that torch has for it.
PyObject* read_for_python(PyObject*, PyObject* args) {
  PyObject* tensor;
  unsigned long long impl;
  if (!PyArg_ParseTuple(args, "OK", &tensor, &impl)) return nullptr;
  View view;
  int64_t *sizes, *strides;
  if (reinterpret_cast<uintptr_t>(impl_of(tensor)) != impl) return none();
  if (!read(tensor, &view) || !read_geometry(tensor, &sizes, &strides)) return none();
  PyObject *shape = tuple_of(sizes, view.dim), *stride = tuple_of(strides, view.dim);
  if (shape == nullptr || stride == nullptr || PyErr_Occurred()) {
    Py_XDECREF(shape);
    Py_XDECREF(stride);
    return nullptr;
  }
  return Py_BuildValue("KNNiiiNN", reinterpret_cast<unsigned long long>(view.data), shape, stride, view.dtype,
                       view.device_type, view.device_index, PyBool_FromLong(view.is_neg),
                       PyBool_FromLong(view.is_conj));
}

PyMethodDef METHODS[] = {
    {"make", make, METH_VARARGS, nullptr},
    {"find", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(find)), METH_FASTCALL, nullptr},
    {"tell", tell, METH_O, nullptr},
    {"read", read_for_python, METH_VARARGS, nullptr},
};

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int32_t swafast_trees_abi() { return 3; }

// Finds torch's functions in its library, which is loaded. Returns (make, find, tell, read), or why not.
__attribute__((visibility("default"))) PyObject* swafast_trees_functions(const char* torch_library, Py_ssize_t offset,
                                                                         PyObject* tensor_type,
                                                                         PyObject* parameter_type) {
  void* library = dlopen(torch_library, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return PyUnicode_FromFormat("%s is not loaded", torch_library);
  for (const Function& function : FUNCTIONS) {
    if (dlsym(library, function.name) == nullptr) {
      return PyUnicode_FromFormat("this torch does not export %s", function.name);
    }
  }
  for (const Function& function : FUNCTIONS) *function.address = dlsym(library, function.name);
  torch.offset = offset;
  plain_types[0] = reinterpret_cast<PyTypeObject*>(tensor_type);
  plain_types[1] = reinterpret_cast<PyTypeObject*>(parameter_type);
  PyObject* dict_size = PyObject_GetAttrString(reinterpret_cast<PyObject*>(&PyDict_Type), "__basicsize__");
  if (dict_size == nullptr) return nullptr;
  dict_words = PyLong_AsSize_t(dict_size) / sizeof(void*);
  Py_DECREF(dict_size);
  constexpr Py_ssize_t count = sizeof(METHODS) / sizeof(METHODS[0]);
  PyObject* functions = PyTuple_New(count);
  for (Py_ssize_t i = 0; functions != nullptr && i < count; i++) {
    PyObject* function = PyCFunction_NewEx(&METHODS[i], nullptr, nullptr);
    if (function == nullptr) Py_CLEAR(functions);
    if (function != nullptr) PyTuple_SetItem(functions, i, function);
  }
  return functions;
}
}
