// The operator `Fused` of the domain `keras_efficient.bolt` for ONNX Runtime: CPU kernels for float32 and float16, and
// CUDA kernels for float16 from a bundle. Not verified: the CUDA part ran on no GPU yet.
//
// A node's inputs are those of its region, then constant arrays; its attributes are `spec`, the region's structure in
// JSON, and `region`, its index in the bundle (`spec.py` and `partition.py` of this package say more). CPU kernels
// compute in float32. CUDA kernels take machine code, packed weights and launch rules from a bundle, whose path stands
// in the session's entry `keras_efficient.bolt.bundle`, else in the variable KERAS_EFFICIENT_BOLT_BUNDLE; without a GPU
// they are never made. Float32 nodes of a CUDA session run on the CPU, since kernels for GPUs compute in float16.
//
// Files may come from anybody: what is read from them has its limits, and what is wrong becomes a status of one line.

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

// For tests: what is added to each result of the CPU, to see who computed; the driver's library; and whether CUDA
// kernels stand in for the CPU's of float16, to run them on a driver that is none.
#ifndef BOLT_SENTINEL
#define BOLT_SENTINEL 0
#endif
#ifndef BOLT_DRIVER
#define BOLT_DRIVER "libcuda.so.1"
#endif
#ifndef BOLT_CUDA_ON_CPU
#define BOLT_CUDA_ON_CPU 0
#endif

struct OrtCustomOp;
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtOpAttr;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;

// ---------------------------------------------------------------------------------- ONNX Runtime's interface
//
// Only what is used. Its table of functions and its struct of an operator only grow at their ends, so places in them
// stay what they are. The table has what is used since version 17 of the interface (release 1.17).

constexpr uint32_t API_VERSION = 17;

struct OrtApiBase {
    void* const* (*get_api)(uint32_t version);
    const char* (*version)();
};

struct OrtCustomOp {
    uint32_t version;
    void* (*create_kernel)(const OrtCustomOp*, void* const* api, const OrtKernelInfo*);
    const char* (*name)(const OrtCustomOp*);
    const char* (*provider)(const OrtCustomOp*);
    int (*input_type)(const OrtCustomOp*, size_t index);
    size_t (*input_count)(const OrtCustomOp*);
    int (*output_type)(const OrtCustomOp*, size_t index);
    size_t (*output_count)(const OrtCustomOp*);
    void (*compute)(void* kernel, OrtKernelContext*);
    void (*destroy)(void* kernel);
    int (*input_characteristic)(const OrtCustomOp*, size_t index);
    int (*output_characteristic)(const OrtCustomOp*, size_t index);
    int (*input_memory)(const OrtCustomOp*, size_t index);
    int (*least_inputs)(const OrtCustomOp*);
    int (*same_inputs)(const OrtCustomOp*);
    int (*least_outputs)(const OrtCustomOp*);
    int (*same_outputs)(const OrtCustomOp*);
    OrtStatus* (*create_kernel_2)(const OrtCustomOp*, void* const* api, const OrtKernelInfo*, void** kernel);
    OrtStatus* (*compute_2)(void* kernel, OrtKernelContext*);
    OrtStatus* (*infer_shape)(const OrtCustomOp*, OrtShapeInferContext*);
    int (*start_version)(const OrtCustomOp*);
    int (*end_version)(const OrtCustomOp*);
};

namespace {

enum { FLOAT = 1, FLOAT16 = 10 };                // types of elements
enum { REQUIRED = 0, VARIADIC = 2 };             // kinds of inputs
enum { INVALID_ARGUMENT = 2, ATTRIBUTE_TEXT = 5 };
enum Function {                                  // places in the table
    CREATE_STATUS = 0,
    GET_ERROR_MESSAGE = 2,
    CREATE_DOMAIN = 26,
    DOMAIN_ADD = 27,
    ADD_DOMAIN = 28,
    TENSOR_DATA = 51,
    CREATE_SHAPE = 57,
    SET_TYPE = 58,
    SET_DIMENSIONS = 59,
    GET_TYPE = 60,
    DIMENSIONS_COUNT = 61,
    GET_DIMENSIONS = 62,
    GET_SYMBOLIC = 63,
    TENSOR_SHAPE = 65,
    ATTRIBUTE_INTEGER = 86,
    ATTRIBUTE_STRING = 87,
    CONTEXT_INPUT_COUNT = 88,
    CONTEXT_INPUT = 90,
    CONTEXT_OUTPUT = 91,
    RELEASE_STATUS = 93,
    RELEASE_SHAPE = 99,
    CONTEXT_STREAM = 193,
    INFO_INPUT_COUNT = 230,
    HAS_CONFIG = 237,
    GET_CONFIG = 238,
    CONSTANT_INPUT = 249,
    INFER_INPUT_COUNT = 267,
    INFER_INPUT = 268,
    INFER_ATTRIBUTE = 269,
    INFER_OUTPUT = 270,
    SET_SYMBOLIC = 271,
    READ_ATTRIBUTE = 272,
    PARALLEL_FOR = 274,
};

// What is told to the caller: one line.
struct Problem : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::string text(const std::string& one) { return one; }
std::string text(const char* one) { return one; }
template <typename Number>
std::string text(Number one) {
    return std::to_string(one);
}
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    std::string line = (text(parts) + ...);
    for (char& one : line) one = static_cast<unsigned char>(one) < ' ' ? ' ' : one;
    if (line.size() > 500) line.resize(500);
    throw Problem(line);
}

struct Shape {
    int type = 0;
    std::vector<int64_t> sizes;       // -1 where it is free
    std::vector<std::string> names;   // of free ones, empty elsewhere; of tensors there are none
};

class Api {
  public:
    explicit Api(void* const* table) : table_(table) {}

    OrtStatus* status(const char* line) const {
        return reinterpret_cast<OrtStatus* (*)(int, const char*)>(table_[CREATE_STATUS])(INVALID_ARGUMENT, line);
    }
    // Calls a function that gives a status; arguments have the types that C declares.
    template <typename... Arguments>
    void call(Function which, Arguments... arguments) const {
        auto* const function = reinterpret_cast<OrtStatus* (*)(Arguments...)>(table_[which]);
        if (OrtStatus* const status = function(arguments...)) {
            auto* const message = reinterpret_cast<const char* (*)(const OrtStatus*)>(table_[GET_ERROR_MESSAGE]);
            const std::string line = message(status);
            reinterpret_cast<void (*)(OrtStatus*)>(table_[RELEASE_STATUS])(status);
            refuse("ONNX Runtime: ", line);
        }
    }
    Shape shape(const OrtValue* value) const {
        OrtTensorTypeAndShapeInfo* info = nullptr;
        call(TENSOR_SHAPE, value, &info);
        const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owner(
            info, reinterpret_cast<void (*)(OrtTensorTypeAndShapeInfo*)>(table_[RELEASE_SHAPE]));
        return shape(static_cast<const OrtTensorTypeAndShapeInfo*>(info), false);
    }
    Shape shape(const OrtTensorTypeAndShapeInfo* info, bool named) const {
        Shape found;
        size_t count = 0;
        call(GET_TYPE, info, &found.type);
        call(DIMENSIONS_COUNT, info, &count);
        found.sizes.resize(count);
        call(GET_DIMENSIONS, info, found.sizes.data(), count);
        if (named) {
            std::vector<const char*> names(count, "");
            call(GET_SYMBOLIC, info, names.data(), count);
            for (const char* one : names) found.names.emplace_back(one ? one : "");
        }
        return found;
    }
    void release(OrtTensorTypeAndShapeInfo* info) const {
        reinterpret_cast<void (*)(OrtTensorTypeAndShapeInfo*)>(table_[RELEASE_SHAPE])(info);
    }
    void* data(const OrtValue* value) const {
        void* found = nullptr;
        call(TENSOR_DATA, const_cast<OrtValue*>(value), &found);
        return found;
    }
    std::string attribute(const OrtKernelInfo* info, const char* name) const {
        size_t size = 0;
        call(ATTRIBUTE_STRING, info, name, static_cast<char*>(nullptr), &size);
        std::string found(size, '\0');
        call(ATTRIBUTE_STRING, info, name, found.data(), &size);
        found.resize(std::strlen(found.c_str()));
        return found;
    }

  private:
    void* const* table_;
};

// --------------------------------------------------------------------------------------------------- JSON

struct Json {
    enum Kind { NOTHING, BOOLEAN, INTEGER, REAL, TEXT, LIST, OBJECT };
    Kind kind = NOTHING;
    int64_t integer = 0;  // of a boolean 0 or 1
    double real = 0;
    std::string text;
    std::vector<std::string> keys;
    std::vector<Json> items;

    const Json* find(std::string_view key) const {
        for (size_t i = 0; i < keys.size(); ++i)
            if (keys[i] == key) return &items[i];
        return nullptr;
    }
    const Json& at(std::string_view key) const {
        if (const Json* found = kind == OBJECT ? find(key) : nullptr) return *found;
        refuse("JSON without ", std::string(key), ".");
    }
    int64_t between(const char* name, int64_t low, int64_t high) const {
        if (kind != INTEGER || integer < low || integer > high)
            refuse("Structure: ", name, " is an integer from ", low, " to ", high, ".");
        return integer;
    }
    bool boolean(const char* name) const {
        if (kind != BOOLEAN) refuse("Structure: ", name, " is true or false.");
        return integer != 0;
    }
    std::vector<int64_t> integers(const char* name, int64_t low, int64_t high, size_t least, size_t most) const {
        if (kind != LIST || items.size() < least || items.size() > most)
            refuse("Structure: ", name, " is a list of ", least, " to ", most, " integers.");
        std::vector<int64_t> found;
        for (const Json& one : items) found.push_back(one.between(name, low, high));
        return found;
    }
    // An object with these keys and no others.
    void only(const char* what, std::initializer_list<const char*> names) const {
        bool right = kind == OBJECT && keys.size() == names.size();
        for (const char* one : names) right = right && find(one);
        if (!right) {
            std::string all;
            for (const char* one : names) all += all.empty() ? one : std::string(", ") + one;
            refuse("Structure: ", what, " has ", all, ".");
        }
    }
};

class JsonReader {
  public:
    explicit JsonReader(std::string_view given) : given_(given) {}

    Json read() {
        Json found = value(0);
        space();
        if (at_ != given_.size()) bad();
        return found;
    }

  private:
    static constexpr int DEEPEST = 32;

    [[noreturn]] void bad() const { refuse("A structure is no JSON: at byte ", at_, "."); }
    char peek() const { return at_ < given_.size() ? given_[at_] : '\0'; }
    void space() {
        while (at_ < given_.size() && std::strchr(" \t\n\r", given_[at_]) && given_[at_]) ++at_;
    }
    bool take(std::string_view word) {
        const bool found = given_.substr(at_, word.size()) == word;
        at_ += found ? word.size() : 0;
        return found;
    }
    Json value(int depth) {
        space();
        Json found;
        if (depth > DEEPEST) bad();
        if (take("null")) return found;
        if (peek() == 't' || peek() == 'f') {
            found.kind = Json::BOOLEAN;
            found.integer = peek() == 't';
            if (!take("true") && !take("false")) bad();
        } else if (peek() == '"') {
            found.kind = Json::TEXT;
            found.text = string();
        } else if (take("[")) {
            found.kind = Json::LIST;
            for (space(); !take("]"); space()) {
                if (!found.items.empty() && !take(",")) bad();
                found.items.push_back(value(depth + 1));
            }
        } else if (take("{")) {
            found.kind = Json::OBJECT;
            for (space(); !take("}"); space()) {
                if (!found.items.empty() && !take(",")) bad();
                space();
                if (peek() != '"') bad();
                std::string key = string();
                space();
                if (!take(":") || known(found, key)) bad();
                found.keys.push_back(std::move(key));
                found.items.push_back(value(depth + 1));
            }
        } else {
            number(found);
        }
        return found;
    }
    // Long objects are kernels of a bundle, by name; keys that come twice are looked for in short ones only.
    static bool known(const Json& object, const std::string& key) {
        return object.keys.size() < 64 && object.find(key);
    }

    void number(Json& found) {
        const size_t start = at_;
        const auto digits = [&] {
            const size_t first = at_;
            while (peek() >= '0' && peek() <= '9') ++at_;
            if (at_ == first) bad();
        };
        take("-");
        if (!take("0")) digits();
        found.kind = Json::INTEGER;
        if (take(".")) digits(), found.kind = Json::REAL;
        if (take("e") || take("E")) {
            if (!take("+")) take("-");
            digits(), found.kind = Json::REAL;
        }
        if (at_ - start > 400) bad();
        const std::string word(given_.substr(start, at_ - start));
        found.real = std::strtod(word.c_str(), nullptr);
        if (found.kind == Json::INTEGER && word.size() > 18) found.kind = Json::REAL;  // beyond all limits here
        if (found.kind == Json::INTEGER) found.integer = std::strtoll(word.c_str(), nullptr, 10);
    }
    unsigned hexadecimal() {
        unsigned found = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            const char* const digits = "0123456789abcdef";
            const char one = static_cast<char>(peek() >= 'A' && peek() <= 'F' ? peek() + 32 : peek());
            const char* const where = one ? std::strchr(digits, one) : nullptr;
            if (!where) bad();
            found = found * 16 + static_cast<unsigned>(where - digits);
        }
        return found;
    }
    std::string string() {
        std::string found;
        ++at_;
        while (!take("\"")) {
            if (at_ >= given_.size() || static_cast<unsigned char>(peek()) < ' ') bad();
            if (!take("\\")) {
                found += given_[at_++];
            } else if (take("u")) {
                unsigned code = hexadecimal();
                if (code >= 0xD800 && code < 0xDC00 && take("\\u"))
                    code = 0x10000 + ((code & 0x3FF) << 10) + (hexadecimal() & 0x3FF);
                int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
                const unsigned heads[] = {0, 0xC0, 0xE0, 0xF0};
                found += static_cast<char>(heads[more] | code >> 6 * more);
                while (more--) found += static_cast<char>(0x80 | (code >> 6 * more & 0x3F));
            } else {
                const char* const letters = "\"\\/bfnrt";
                const char* const where = peek() ? std::strchr(letters, peek()) : nullptr;
                if (!where) bad();
                found += "\"\\/\b\f\n\r\t"[where - letters];
                ++at_;
            }
        }
        return found;
    }

    std::string_view given_;
    size_t at_ = 0;
};

// --------------------------------------------------------------------------------------------------- regions

constexpr int64_t LONGEST_TEXT = 1 << 20, MOST_LAYERS = 1024, MOST_INPUTS = 256, MOST_STEPS = 64;
constexpr int64_t MOST_CHANNELS = 1 << 20, MOST_KERNEL = 255, MOST_SHUFFLE = 16, MOST_NUMBERS = (int64_t{1} << 31) - 1;

int64_t product(std::initializer_list<int64_t> sizes) {
    int64_t found = 1;
    for (const int64_t one : sizes)
        if (__builtin_mul_overflow(found, one, &found) || found > MOST_NUMBERS)
            refuse("A value of more than ", MOST_NUMBERS, " numbers.");
    return found;
}

enum class Kind { ADD, RELU, PRELU, CLIP, GELU, GELU_TANH, SILU, HARD_SWISH, SOFTPLUS, SIGMOID, TANH };
constexpr const char* KINDS[] = {"add",  "relu",       "prelu",    "clip",    "gelu", "gelu_tanh",
                                 "silu", "hard_swish", "softplus", "sigmoid", "tanh"};

struct Step {
    Kind kind = Kind::ADD;
    int64_t value = 0;   // that is added
    int64_t count = 0;   // of slopes, or the channels of what is added
    float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
    std::vector<float> slopes;
};

struct Layer {
    int64_t value = 0, channels = 0, filters = 0;
    std::vector<int64_t> kernel, stride, dilation, padding;
    bool depthwise = false;
    std::vector<Step> steps;
    std::vector<float> weights, bias;  // as the CPU kernels read them

    int64_t reach(int axis) const { return (kernel[axis] - 1) * dilation[axis]; }
    int64_t zeros(int axis) const { return padding[axis] + padding[axis + 2]; }
};

struct Region {
    bool rows = false;
    int64_t shuffle = 1;
    std::vector<int64_t> channels;  // of inputs
    std::vector<Layer> layers;

    int64_t inputs() const { return static_cast<int64_t>(channels.size()); }
};

Step parsed_step(const Json& given, const std::vector<int64_t>& known, int64_t filters) {
    Step step;
    if (given.kind == Json::OBJECT && given.find("add")) {
        given.only("a step", {"add"});
        step.value = given.at("add").between("add", 0, static_cast<int64_t>(known.size()) - 1);
        const int64_t channels = known[step.value];
        if (channels != 1 && channels != filters)
            refuse("A value of ", channels, " channels is added to ", filters, ".");
        step.count = channels;
        return step;
    }
    const Json* const kind = given.kind == Json::OBJECT ? given.find("kind") : nullptr;
    const auto* const found = std::find_if(std::begin(KINDS) + 1, std::end(KINDS),
                                           [&](const char* one) { return kind && kind->text == one; });
    if (found == std::end(KINDS)) refuse("A step is no activation.");
    step.kind = static_cast<Kind>(found - std::begin(KINDS));
    if (step.kind == Kind::PRELU) {
        given.only("a step", {"kind", "slopes"});
        step.count = given.at("slopes").between("slopes", 1, MOST_CHANNELS);
        if (step.count != 1 && step.count != filters) refuse(step.count, " slopes for ", filters, " channels.");
    } else if (step.kind == Kind::CLIP) {
        given.only("a step", {"kind", "low", "high"});
        for (const auto& [name, limit] : {std::pair{"low", &step.low}, {"high", &step.high}}) {
            const Json& one = given.at(name);
            if (one.kind == Json::NOTHING) continue;
            if ((one.kind != Json::INTEGER && one.kind != Json::REAL) || !std::isfinite(one.real))
                refuse("A clip's limits are numbers.");
            *limit = static_cast<float>(one.real);
        }
        if (step.low > step.high) refuse("A clip from ", step.low, " to ", step.high, ".");
    } else {
        given.only("a step", {"kind"});
    }
    return step;
}

Layer parsed_layer(const Json& given, const std::vector<int64_t>& known, const Region& region) {
    given.only("a layer", {"value", "kernel", "channels", "filters", "stride", "dilation", "padding", "depthwise",
                           "steps"});
    Layer layer;
    layer.value = given.at("value").between("value", 0, static_cast<int64_t>(known.size()) - 1);
    layer.depthwise = given.at("depthwise").boolean("depthwise");
    layer.channels = given.at("channels").between("channels", 1, MOST_CHANNELS);
    layer.filters = given.at("filters").between("filters", 1, MOST_CHANNELS);
    layer.kernel = given.at("kernel").integers("kernel", 1, MOST_KERNEL, 2, 2);
    layer.stride = given.at("stride").integers("stride", 1, MOST_KERNEL, 2, 2);
    layer.dilation = given.at("dilation").integers("dilation", 1, MOST_KERNEL, 2, 2);
    layer.padding = given.at("padding").integers("padding", 0, MOST_KERNEL, 4, 4);
    if ((layer.value > 0 && layer.value < region.inputs()) || known[layer.value] != layer.channels)
        refuse("A layer of ", layer.channels, " channels reads value ", layer.value, " of ", known[layer.value], ".");
    if (layer.depthwise && layer.filters != layer.channels)
        refuse("A depthwise layer makes ", layer.filters, " channels of ", layer.channels, ".");
    const bool plain = std::max({layer.kernel[0], layer.kernel[1], layer.stride[0], layer.stride[1], layer.dilation[0],
                                 layer.dilation[1], layer.zeros(0) + layer.zeros(1) + 1}) == 1;
    if (region.rows && (layer.depthwise || !plain))
        refuse("A layer of rows is a product by a matrix: kernel, stride and dilation 1, no padding.");
    product({layer.kernel[0], layer.kernel[1], layer.channels, layer.filters});
    const Json& steps = given.at("steps");
    if (steps.kind != Json::LIST || static_cast<int64_t>(steps.items.size()) > MOST_STEPS)
        refuse("A layer has at most ", MOST_STEPS, " steps.");
    for (const Json& one : steps.items) layer.steps.push_back(parsed_step(one, known, layer.filters));
    return layer;
}

Region parsed_region(const std::string& spec) {
    if (static_cast<int64_t>(spec.size()) > LONGEST_TEXT)
        refuse("A region's structure is a text of at most ", LONGEST_TEXT, " characters.");
    const Json given = JsonReader(spec).read();
    given.only("a region", {"version", "rows", "shuffle", "channels", "layers"});
    given.at("version").between("version", 1, 1);
    Region region;
    region.rows = given.at("rows").boolean("rows");
    region.shuffle = given.at("shuffle").between("shuffle", 1, MOST_SHUFFLE);
    region.channels = given.at("channels").integers("channels", 1, MOST_CHANNELS, 1, MOST_INPUTS);
    const Json& layers = given.at("layers");
    if (layers.kind != Json::LIST || layers.items.empty() || static_cast<int64_t>(layers.items.size()) > MOST_LAYERS)
        refuse("A region has 1 to ", MOST_LAYERS, " layers.");
    std::vector<int64_t> known = region.channels;
    for (const Json& one : layers.items) {
        region.layers.push_back(parsed_layer(one, known, region));
        known.push_back(region.layers.back().filters);
    }
    if (known.back() % (region.shuffle * region.shuffle) || (region.rows && region.shuffle > 1))
        refuse("A region of ", known.back(), " channels cannot be shuffled by ", region.shuffle, ".");
    return region;
}

// Sizes of all values of a region.
struct Sizes {
    int64_t images = 1;
    std::vector<std::array<int64_t, 2>> values;  // height and width
    std::vector<int64_t> output;                 // the shape of the result
    bool empty = false;
};

std::string written(const std::vector<int64_t>& shape) {
    std::string found;
    for (const int64_t one : shape) found += (found.empty() ? "" : "×") + std::to_string(one);
    return found.empty() ? "a single number" : found;
}

Sizes sizes_of(const Region& region, const std::vector<std::vector<int64_t>>& shapes) {
    Sizes found;
    const std::vector<int64_t>& first = shapes[0];
    for (size_t i = 0; i < shapes.size(); ++i) {
        const std::vector<int64_t>& one = shapes[i];
        if ((region.rows ? one.empty() : one.size() != 4) || one.back() != region.channels[i])
            refuse("Input ", i, " of a region is ", written(one), "; ", region.rows ? "rows" : "N×H×W", " of ",
                   region.channels[i], " numbers are wanted.");
        if (region.rows) {
            int64_t rows = 1;
            for (size_t axis = 0; axis + 1 < one.size(); ++axis) rows = product({rows, one[axis]});
            found.values.push_back({1, rows});
        } else {
            product({one[1], one[2], one[3]});
            found.values.push_back({one[1], one[2]});
        }
        if (region.rows ? !std::equal(one.begin(), one.end() - 1, first.begin(), first.end() - 1) : one[0] != first[0])
            refuse("Inputs of a region are ", written(first), " and ", written(one), ".");
    }
    found.images = region.rows ? 1 : first[0];
    found.empty = region.rows ? found.values[0][1] == 0 : found.images == 0;
    for (const Layer& layer : region.layers) {
        std::array<int64_t, 2> size{};
        for (int axis = 0; axis < 2; ++axis) {
            const int64_t room = found.values[layer.value][axis] + layer.zeros(axis) - layer.reach(axis) - 1;
            if (room < 0 && !(region.rows && found.empty))
                refuse("An image of ", found.values[layer.value][0], "×", found.values[layer.value][1],
                       " is smaller than the kernel.");
            size[axis] = room < 0 ? 0 : room / layer.stride[axis] + 1;
        }
        product({size[0], size[1], layer.filters});
        for (const Step& step : layer.steps)
            if (step.kind == Kind::ADD && found.values[step.value] != size)
                refuse("An image of ", found.values[step.value][0], "×", found.values[step.value][1], " is added to ",
                       size[0], "×", size[1], ".");
        found.values.push_back(size);
    }
    const auto [height, width] = found.values.back();
    const int64_t block = region.shuffle, filters = region.layers.back().filters / (block * block);
    if (region.rows) {
        found.output = first;
        found.output.back() = filters;
    } else {
        found.output = {found.images, height * block, width * block, filters};
    }
    return found;
}

// --------------------------------------------------------------------------------------------------- on the CPU

typedef float Vector __attribute__((vector_size(32)));
typedef float Loaded __attribute__((vector_size(32), aligned(4), may_alias));  // from any place
constexpr int LANES = 8, TILE = 6;          // places whose sums are kept in registers, of 8 or 16 filters each
constexpr int64_t CHUNK = 16 * TILE;        // places that are one task

int64_t width_of_block(int64_t filters) { return filters <= LANES ? LANES : 2 * LANES; }

// Converts between halves and floats; halves are rounded to the nearest even.
template <typename From, typename To>
void converted(const From* from, To* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

// Weights as ONNX has them, to (block of filters, row, column, channel, filter of the block); depthwise ones to (row,
// column, channel).
std::vector<float> packed(const Layer& layer, const std::vector<float>& given, bool rows) {
    const int64_t places = layer.kernel[0] * layer.kernel[1];
    if (layer.depthwise) {
        std::vector<float> found(given.size());
        for (int64_t c = 0; c < layer.channels; ++c)
            for (int64_t k = 0; k < places; ++k) found[k * layer.channels + c] = given[c * places + k];
        return found;
    }
    const int64_t width = width_of_block(layer.filters), blocks = (layer.filters + width - 1) / width;
    std::vector<float> found(static_cast<size_t>(blocks * width * places * layer.channels));
    for (int64_t f = 0; f < layer.filters; ++f)
        for (int64_t c = 0; c < layer.channels; ++c)
            for (int64_t k = 0; k < places; ++k)
                found[((f / width * places + k) * layer.channels + c) * width + f % width] =
                    rows ? given[c * layer.filters + f] : given[(f * layer.channels + c) * places + k];
    return found;
}

// One layer of one image.
struct Work {
    const Layer* layer;
    const float* input;   // with its zeros around it
    int64_t input_width;  // of a row, in places
    float* output;
    int64_t width, chunks;  // places of a row of the output, and tasks of a row
    std::vector<const float*> values;
};

template <int vectors>
[[gnu::always_inline]] inline void products(const Work& work, const float* const* places, const float* weights,
                                            float* sums) {
    const Layer& layer = *work.layer;
    Vector all[TILE][vectors] = {};
    // Columns of a kernel that is not dilated lie side by side.
    const bool joined = layer.dilation[1] == 1;
    const int64_t runs = joined ? 1 : layer.kernel[1], run = joined ? layer.kernel[1] * layer.channels : layer.channels;
    for (int64_t row = 0; row < layer.kernel[0]; ++row) {
        for (int64_t column = 0; column < runs; ++column) {
            const int64_t above = row * layer.dilation[0] * work.input_width, beside = column * layer.dilation[1];
            const int64_t start = (above + beside) * layer.channels;
            for (int64_t i = start; i < start + run; ++i, weights += vectors * LANES) {
                Vector one[vectors];
#pragma GCC unroll 2
                for (int vector = 0; vector < vectors; ++vector)
                    one[vector] = *reinterpret_cast<const Loaded*>(weights + vector * LANES);
#pragma GCC unroll 8
                for (int place = 0; place < TILE; ++place)
#pragma GCC unroll 2
                    for (int vector = 0; vector < vectors; ++vector)
                        all[place][vector] += places[place][i] * one[vector];
            }
        }
    }
    std::memcpy(sums, all, sizeof all);
}

// Places `first` to `last` of a row of the output, without the steps.
void convolved(const Work& work, int64_t row, int64_t first, int64_t last) {
    const Layer& layer = *work.layer;
    const int64_t filters = layer.filters, width = width_of_block(filters);
    const float* const input = work.input + row * layer.stride[0] * work.input_width * layer.channels;
    const int64_t step = layer.stride[1] * layer.channels;
    for (int64_t block = 0; block * width < filters; ++block) {
        const int64_t start = block * width, count = std::min(width, filters - start);
        const float* const weights = layer.weights.data() + start * layer.kernel[0] * layer.kernel[1] * layer.channels;
        for (int64_t place = first; place < last; place += TILE) {
            const float* places[TILE];
            for (int i = 0; i < TILE; ++i) places[i] = input + std::min(place + i, last - 1) * step;
            float sums[TILE * 2 * LANES];
            width == LANES ? products<1>(work, places, weights, sums) : products<2>(work, places, weights, sums);
            float* output = work.output + (row * work.width + place) * filters + start;
            for (int64_t i = 0; i < std::min<int64_t>(TILE, last - place); ++i, output += filters)
                for (int64_t f = 0; f < count; ++f) output[f] = sums[i * width + f] + layer.bias[start + f];
        }
    }
}

void convolved_depthwise(const Work& work, int64_t row, int64_t first, int64_t last) {
    const Layer& layer = *work.layer;
    const int64_t channels = layer.channels;
    for (int64_t place = first; place < last; ++place) {
        float* const output = work.output + (row * work.width + place) * channels;
        std::copy(layer.bias.begin(), layer.bias.end(), output);
        for (int64_t down = 0; down < layer.kernel[0]; ++down) {
            for (int64_t across = 0; across < layer.kernel[1]; ++across) {
                const int64_t y = row * layer.stride[0] + down * layer.dilation[0];
                const int64_t x = place * layer.stride[1] + across * layer.dilation[1];
                const float* const input = work.input + (y * work.input_width + x) * channels;
                const float* const weights = layer.weights.data() + (down * layer.kernel[1] + across) * channels;
                for (int64_t c = 0; c < channels; ++c) output[c] += input[c] * weights[c];
            }
        }
    }
}

template <typename Function>
[[gnu::always_inline]] inline void each(float* numbers, int64_t count, Function function) {
    for (int64_t i = 0; i < count; ++i) numbers[i] = function(numbers[i]);
}

void stepped(const Work& work, const Step& step, int64_t start, int64_t places) {
    const int64_t filters = work.layer->filters, count = places * filters;
    float* const y = work.output + start * filters;
    const float low = step.low, high = step.high;
    switch (step.kind) {
        case Kind::ADD: {
            const float* const other = work.values[static_cast<size_t>(step.value)];
            if (step.count == filters)
                for (int64_t i = 0; i < count; ++i) y[i] += other[start * filters + i];
            else
                for (int64_t i = 0; i < places; ++i)  // one channel is added to all
                    for (int64_t f = 0; f < filters; ++f) y[i * filters + f] += other[start + i];
            break;
        }
        case Kind::RELU: return each(y, count, [](float x) { return x < 0 ? 0 : x; });
        case Kind::PRELU:
            for (int64_t i = 0; i < places; ++i)
                for (int64_t f = 0; f < filters; ++f) {
                    float& x = y[i * filters + f];
                    x = x < 0 ? x * step.slopes[f] : x;
                }
            break;
        case Kind::CLIP: return each(y, count, [=](float x) { return x < low ? low : x > high ? high : x; });
        case Kind::GELU: return each(y, count, [](float x) { return 0.5f * x * (1 + std::erf(x * 0.70710678f)); });
        case Kind::GELU_TANH:
            return each(y, count, [](float x) {
                return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
            });
        case Kind::SILU: return each(y, count, [](float x) { return x / (1 + std::exp(-x)); });
        case Kind::HARD_SWISH: return each(y, count, [](float x) { return x * std::clamp(x + 3, 0.f, 6.f) / 6; });
        case Kind::SOFTPLUS:
            return each(y, count, [](float x) { return std::max(x, 0.f) + std::log1p(std::exp(-std::fabs(x))); });
        case Kind::SIGMOID: return each(y, count, [](float x) { return 1 / (1 + std::exp(-x)); });
        case Kind::TANH: return each(y, count, [](float x) { return std::tanh(x); });
    }
}

// One task, of ONNX Runtime's threads.
void task(void* given, size_t index) {
    const Work& work = *static_cast<const Work*>(given);
    const int64_t row = static_cast<int64_t>(index) / work.chunks;
    const int64_t first = static_cast<int64_t>(index) % work.chunks * CHUNK, last = std::min(first + CHUNK, work.width);
    (work.layer->depthwise ? convolved_depthwise : convolved)(work, row, first, last);
    for (const Step& step : work.layer->steps) stepped(work, step, row * work.width + first, last - first);
}

std::unique_ptr<float[]> room(int64_t numbers) {
    return std::unique_ptr<float[]>(new float[static_cast<size_t>(numbers)]);
}

// A copy with zeros around it; none where a layer has no padding.
std::unique_ptr<float[]> with_zeros(const Layer& layer, const float* input, std::array<int64_t, 2> size) {
    if (layer.zeros(0) + layer.zeros(1) == 0) return nullptr;
    const int64_t height = size[0] + layer.zeros(0), width = size[1] + layer.zeros(1), row = size[1] * layer.channels;
    const int64_t count = product({height, width, layer.channels});
    auto found = room(count);
    std::fill_n(found.get(), count, 0.f);
    for (int64_t y = 0; y < size[0]; ++y)
        std::copy_n(input + y * row, row,
                    found.get() + ((y + layer.padding[0]) * width + layer.padding[1]) * layer.channels);
    return found;
}

struct Kernel {
    virtual ~Kernel() = default;
    virtual void compute(const Api& api, OrtKernelContext* context) = 0;

    Kernel(const Api& api, const OrtKernelInfo* info) : region(parsed_region(api.attribute(info, "spec"))) {}

    // Shapes of the region's inputs, after a check of what else comes.
    Sizes sizes(const Api& api, const OrtKernelContext* context, std::vector<const void*>& data) const {
        std::vector<std::vector<int64_t>> shapes;
        for (int64_t i = 0; i < region.inputs(); ++i) {
            const OrtValue* value = nullptr;
            api.call(CONTEXT_INPUT, context, static_cast<size_t>(i), &value);
            if (!value) refuse("Input ", i, " of a region is missing.");
            shapes.push_back(api.shape(value).sizes);
            data.push_back(api.data(value));
        }
        return sizes_of(region, shapes);
    }

    Region region;
};

void* output_of(const Api& api, OrtKernelContext* context, const Sizes& sizes) {
    OrtValue* value = nullptr;
    api.call(CONTEXT_OUTPUT, context, size_t{0}, sizes.output.data(), sizes.output.size(), &value);
    return api.data(value);
}

template <typename Number>
class CpuKernel final : public Kernel {
  public:
    CpuKernel(const Api& api, const OrtKernelInfo* info) : Kernel(api, info) {
        size_t count = 0, index = static_cast<size_t>(region.inputs());
        api.call(INFO_INPUT_COUNT, info, &count);
        last_.assign(region.channels.size(), -1);
        for (size_t number = 0; number < region.layers.size(); ++number) {
            Layer& layer = region.layers[number];
            std::vector<int64_t> shape{layer.channels, layer.filters};
            if (!region.rows)
                shape = {layer.filters, layer.depthwise ? 1 : layer.channels, layer.kernel[0], layer.kernel[1]};
            layer.weights = packed(layer, constant(api, info, index++, count, shape), region.rows);
            layer.bias = constant(api, info, index++, count, {layer.filters});
            last_[static_cast<size_t>(layer.value)] = static_cast<int64_t>(number);
            for (Step& step : layer.steps) {
                if (step.kind == Kind::ADD) {
                    last_[static_cast<size_t>(step.value)] = static_cast<int64_t>(number);
                } else if (step.kind == Kind::PRELU) {
                    shape = {step.count, 1, 1};
                    if (region.rows) shape = {step.count};
                    step.slopes = constant(api, info, index++, count, shape);
                    step.slopes.resize(static_cast<size_t>(layer.filters), step.slopes[0]);
                }
            }
            last_.push_back(-1);
        }
        if (index != count) refuse("A region has ", count, " inputs, its structure wants ", index, ".");
    }

    void compute(const Api& api, OrtKernelContext* context) override {
        std::vector<const void*> data;
        const Sizes sizes = this->sizes(api, context, data);
        auto* output = static_cast<Number*>(output_of(api, context, sizes));
        if (sizes.empty) return;
        const int64_t filters = region.layers.back().filters;
        for (int64_t image = 0; image < sizes.images; ++image) {
            const std::unique_ptr<float[]> found = one(api, context, sizes, data, image);
            const auto [height, width] = sizes.values.back();
            write(found.get(), output, height, width, filters);
            output += height * width * filters;
        }
    }

  private:
    static std::vector<float> constant(const Api& api, const OrtKernelInfo* info, size_t index, size_t count,
                                       const std::vector<int64_t>& wanted) {
        if (index >= count) refuse("A region has ", count, " inputs, its structure wants more.");
        int is_constant = 0;
        const OrtValue* value = nullptr;
        api.call(CONSTANT_INPUT, info, index, &is_constant, &value);
        if (!is_constant || !value) refuse("Input ", index, " of a region, an array of weights, is not constant.");
        const Shape shape = api.shape(value);
        if (shape.sizes != wanted)
            refuse("Input ", index, " of a region is ", written(shape.sizes), ", its structure wants ", written(wanted),
                   ".");
        int64_t numbers = 1;
        for (const int64_t one : wanted) numbers *= one;
        std::vector<float> found(static_cast<size_t>(numbers));
        if (shape.type == FLOAT)
            std::copy_n(static_cast<const float*>(api.data(value)), numbers, found.data());
        else if (shape.type == FLOAT16)
            converted(static_cast<const _Float16*>(api.data(value)), found.data(), numbers);
        else
            refuse("Input ", index, " of a region is neither float32 nor float16.");
        return found;
    }

    // The last value of one image, before the shuffle.
    std::unique_ptr<float[]> one(const Api& api, OrtKernelContext* context, const Sizes& sizes,
                                 const std::vector<const void*>& data, int64_t image) const {
        std::vector<std::unique_ptr<float[]>> owned(sizes.values.size());
        std::vector<const float*> values(sizes.values.size());
        for (size_t i = 0; i < data.size(); ++i) {
            const int64_t count = product({sizes.values[i][0], sizes.values[i][1], region.channels[i]});
            const Number* const from = static_cast<const Number*>(data[i]) + image * count;
            if constexpr (std::is_same_v<Number, float>) {
                values[i] = from;
            } else {
                owned[i] = room(count);
                converted(from, owned[i].get(), count);
                values[i] = owned[i].get();
            }
        }
        for (size_t number = 0; number < region.layers.size(); ++number) {
            const Layer& layer = region.layers[number];
            const size_t source = static_cast<size_t>(layer.value), target = data.size() + number;
            const auto [height, width] = sizes.values[target];
            const auto padded = with_zeros(layer, values[source], sizes.values[source]);
            owned[target] = room(product({height, width, layer.filters}));
            values[target] = owned[target].get();
            Work work{&layer, padded ? padded.get() : values[source], sizes.values[source][1] + layer.zeros(1),
                      owned[target].get(), width, (width + CHUNK - 1) / CHUNK, values};
            api.call(PARALLEL_FOR, static_cast<const OrtKernelContext*>(context), &task,
                     static_cast<size_t>(height * work.chunks), size_t{0}, static_cast<void*>(&work));
            for (size_t i = 0; i < target; ++i)
                if (last_[i] <= static_cast<int64_t>(number)) owned[i].reset();  // nobody reads it any more
        }
        return std::move(owned.back());
    }

    void write(float* found, Number* output, int64_t height, int64_t width, int64_t filters) const {
        const int64_t block = region.shuffle, channels = filters / (block * block), count = height * width * filters;
        if constexpr (BOLT_SENTINEL != 0) each(found, count, [](float x) { return x + BOLT_SENTINEL; });
        if (block == 1) return converted(found, output, count);
        for (int64_t y = 0; y < height; ++y)
            for (int64_t i = 0; i < block; ++i)
                for (int64_t x = 0; x < width; ++x, output += block * channels)
                    converted(found + (y * width + x) * filters + i * block * channels, output, block * channels);
    }

    std::vector<int64_t> last_;  // of each value, the last layer that reads it
};

// --------------------------------------------------------------------------------------------------- bundles

std::array<uint8_t, 32> sha256(std::string_view given) {
    static const std::array<uint32_t, 64> constants = [] {
        // The first 32 bits of the fractions of the cube roots of the first 64 primes.
        std::array<uint32_t, 64> found{};
        for (unsigned number = 2, count = 0; count < 64; ++number) {
            bool prime = true;
            for (unsigned one = 2; one * one <= number; ++one) prime = prime && number % one;
            if (!prime) continue;
            uint64_t root = 0;  // of the number times 2⁹⁶, rounded down
            for (int bit = 35; bit >= 0; --bit) {
                const unsigned __int128 next = root | uint64_t{1} << bit, whole = number;
                if (next * next * next <= whole << 96) root = static_cast<uint64_t>(next);
            }
            found[count++] = static_cast<uint32_t>(root);
        }
        return found;
    }();
    std::array<uint32_t, 8> state = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                     0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    const auto turned = [](uint32_t x, int bits) { return x >> bits | x << (32 - bits); };
    const auto block = [&](const uint8_t* bytes) {
        uint32_t words[64];
        for (int i = 0; i < 16; ++i)
            words[i] = static_cast<uint32_t>(bytes[4 * i] << 24 | bytes[4 * i + 1] << 16 | bytes[4 * i + 2] << 8 |
                                             bytes[4 * i + 3]);
        for (int i = 16; i < 64; ++i) {
            const uint32_t a = words[i - 15], b = words[i - 2];
            words[i] = words[i - 16] + words[i - 7] + (turned(a, 7) ^ turned(a, 18) ^ a >> 3) +
                       (turned(b, 17) ^ turned(b, 19) ^ b >> 10);
        }
        auto [a, b, c, d, e, f, g, h] = state;
        for (int i = 0; i < 64; ++i) {
            const uint32_t one = h + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & f) ^ (~e & g)) +
                                 constants[static_cast<size_t>(i)] + words[i];
            const uint32_t two = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
            h = g, g = f, f = e, e = d + one, d = c, c = b, b = a, a = one + two;
        }
        const uint32_t added[] = {a, b, c, d, e, f, g, h};
        for (size_t i = 0; i < 8; ++i) state[i] += added[i];
    };
    const auto* const bytes = reinterpret_cast<const uint8_t*>(given.data());
    const size_t whole = given.size() / 64 * 64, left = given.size() - whole;
    for (size_t at = 0; at < whole; at += 64) block(bytes + at);
    uint8_t end[128] = {};
    std::copy_n(bytes + whole, left, end);
    end[left] = 0x80;
    const size_t size = left < 56 ? 64 : 128;
    for (size_t i = 0; i < 8; ++i) end[size - 1 - i] = static_cast<uint8_t>(uint64_t{given.size()} * 8 >> 8 * i);
    for (size_t at = 0; at < size; at += 64) block(end + at);
    std::array<uint8_t, 32> found{};
    for (size_t i = 0; i < 32; ++i) found[i] = static_cast<uint8_t>(state[i / 4] >> (24 - 8 * (i % 4)));
    return found;
}

std::string hexadecimal(const std::array<uint8_t, 32>& bytes) {
    std::string found;
    for (const uint8_t one : bytes) found += {"0123456789abcdef"[one / 16], "0123456789abcdef"[one % 16]};
    return found;
}

// A file as `bundle.py` writes it, read and checked as a whole.
class Bundle {
  public:
    explicit Bundle(const std::string& path) : path_(path), content_(bytes_of(path, MOST_BYTES)) {
        check();
        ++alive;
    }
    Bundle(const Bundle&) = delete;
    ~Bundle() { --alive; }

    static inline std::atomic<int> alive = 0;  // bundles in memory

    std::string_view section(const std::string& key) const {
        const auto found = sections_.find(key);
        if (found == sections_.end()) refuse(path_, ": has no section ", key, ".");
        return found->second;
    }
    bool has(const std::string& key) const { return sections_.contains(key); }
    // Whether a file is this one still: its header has the hash of a table that has the hashes of all else.
    bool is(const std::string& path) const {
        return path == path_ && bytes_of(path, HEADER) == content_.substr(0, HEADER);
    }
    size_t count() const { return sections_.size(); }
    const std::string& path() const { return path_; }

    Json launches;

  private:
    static constexpr size_t HEADER = 48, MOST_TABLE = 1 << 20, MOST_NAME = 200;
    static constexpr long MOST_BYTES = 1L << 31;
    // Kinds of which there is one section, without a name; those with names; and those that are JSON objects.
    static constexpr std::array SINGLE = {"onnx", "launches", "tuning", "metadata"};
    static constexpr std::array NAMED = {"cubin", "ptx", "source", "weights"};
    static constexpr std::array JSON = {"launches", "tuning", "metadata"};

    static bool is_one_of(std::span<const char* const> kinds, const std::string& kind) {
        return std::find(kinds.begin(), kinds.end(), kind) != kinds.end();
    }
    static bool is_entry(const Json& one) {
        constexpr Json::Kind kinds[] = {Json::TEXT, Json::TEXT, Json::INTEGER, Json::TEXT};
        const auto is_kind = [](const Json& part, Json::Kind kind) { return part.kind == kind; };
        if (one.kind != Json::LIST ||
            !std::equal(one.items.begin(), one.items.end(), std::begin(kinds), std::end(kinds), is_kind))
            return false;
        const std::string &kind = one.items[0].text, &name = one.items[1].text;
        const auto begins = [](char byte) { return (byte & 0xC0) != 0x80; };  // a character, in UTF-8
        const auto length = static_cast<size_t>(std::count_if(name.begin(), name.end(), begins));
        return one.items[2].integer >= 0 && ((is_one_of(SINGLE, kind) && name.empty()) ||
                                             (is_one_of(NAMED, kind) && !name.empty() && length <= MOST_NAME));
    }
    // Whether bytes are UTF-8.
    static bool is_text(std::string_view given) {
        for (size_t at = 0; at < given.size();) {
            const auto byte = [&](size_t i) { return static_cast<uint8_t>(given[at + i]); };
            const size_t more = byte(0) < 0x80 ? 0 : byte(0) < 0xC2 ? 4 : byte(0) < 0xE0 ? 1 : byte(0) < 0xF0 ? 2 : 3;
            if (more == 4 || byte(0) > 0xF4 || given.size() - at <= more) return false;
            for (size_t i = 1; i <= more; ++i)
                if ((byte(i) & 0xC0) != 0x80) return false;
            // Longer than it need be, half of a pair, or beyond the last character.
            if (more > 1 && (byte(0) == 0xE0 ? byte(1) < 0xA0 : byte(0) == 0xED ? byte(1) > 0x9F
                             : byte(0) == 0xF0 ? byte(1) < 0x90 : byte(0) == 0xF4 && byte(1) > 0x8F))
                return false;
            at += more + 1;
        }
        return true;
    }
    // What is no JSON is nothing.
    static Json read(std::string_view part) {
        try {
            return is_text(part) ? JsonReader(part).read() : Json();
        } catch (const Problem&) {
            return {};
        }
    }

    // Reads the table and all sections.
    void check() {
        if (content_.size() < HEADER || !content_.starts_with("\x89" "BOLT\r\n\x1a"))
            refuse(path_, ": is no .bolt file.");
        const uint32_t version = number(8), table_bytes = number(12);
        if (version != 1) refuse(path_, ": has format version ", version, ", and this release reads 1.");
        if (table_bytes > MOST_TABLE || table_bytes > content_.size() - HEADER)
            damaged("its table goes beyond its end");
        const std::string_view all = content_, table = all.substr(HEADER, table_bytes);
        const auto digest = sha256(table);
        if (std::memcmp(digest.data(), content_.data() + 16, digest.size()) != 0)
            damaged("its table does not have its SHA-256");
        const Json entries = read(table);
        if (entries.kind != Json::LIST) damaged("its table is none");
        size_t at = HEADER + table_bytes;
        for (const Json& one : entries.items) {
            if (!is_entry(one)) damaged("its table is none");
            const int64_t length = one.items[2].integer;
            if (static_cast<uint64_t>(length) > content_.size() - at)
                damaged("it does not have the length that its table gives");
            const std::string& kind = one.items[0].text;
            const std::string key = kind + "/" + one.items[1].text;
            const std::string_view part = all.substr(at, static_cast<size_t>(length));
            at += part.size();
            if (hexadecimal(sha256(part)) != one.items[3].text)
                damaged("section " + key + " does not have its SHA-256");
            if (!sections_.emplace(key, part).second) damaged("section " + key + " is there twice");
            if (is_one_of(JSON, kind) && read(part).kind != Json::OBJECT)
                damaged("section " + key + " is no JSON object");
            if (kind == "source" && !is_text(part)) damaged("section " + key + " is no text");
        }
        if (at != content_.size()) damaged("it does not have the length that its table gives");
        for (const char* const one : SINGLE)
            if (!has(std::string(one) + "/")) damaged(std::string("section ") + one + " is missing");
        launches = JsonReader(section("launches/")).read();
    }
    [[noreturn]] void damaged(const std::string& what) const {
        refuse(path_, ": is damaged, build or copy it again: ", what, ".");
    }
    uint32_t number(size_t at) const {
        uint32_t found = 0;
        for (size_t i = 4; i-- > 0;) found = found << 8 | static_cast<uint8_t>(content_[at + i]);
        return found;
    }
    // The first bytes of a file, or all of them.
    static std::string bytes_of(const std::string& path, long most) {
        const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
        if (!file || std::fseek(file.get(), 0, SEEK_END) != 0) refuse(path, ": cannot be read.");
        const long size = std::ftell(file.get());
        if (size < 0 || size > MOST_BYTES) refuse(path, ": cannot be read, or is larger than a bundle.");
        std::rewind(file.get());
        std::string found(static_cast<size_t>(std::min(size, most)), '\0');
        if (std::fread(found.data(), 1, found.size(), file.get()) != found.size()) refuse(path, ": cannot be read.");
        return found;
    }

    std::string path_, content_;
    std::map<std::string, std::string_view> sections_;  // by kind and name
};

// What `grids.launch` gives: blocks, and the integers that a kernel takes behind height and width.
struct Launch {
    std::array<int64_t, 3> grid{1, 1, 1};
    std::vector<int64_t> integers;
};

int64_t quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

Launch launch(const Json& rule, int64_t n, int64_t height, int64_t width, int64_t processors) {
    constexpr int64_t LIMIT = int64_t{1} << 31;
    const auto integer = [&](const char* name, int64_t low = 1) { return rule.at(name).between(name, low, LIMIT - 1); };
    if (std::min({n, height, width}) < 1) refuse(n, " images of ", height, " × ", width, " have nothing to compute.");
    const std::string& kind = rule.at("kind").text;
    std::array<int64_t, 2> out{height, width};
    if (kind != "strip") {
        const std::vector<int64_t> given = rule.at("geometry").integers("geometry", 0, LIMIT - 1, 8, 8);
        if (std::min(given[2], given[3]) < 1) refuse("A launch with a stride of 0.");
        const int64_t down = height + given[4] + given[6] - given[0] - 1;
        const int64_t beside = width + given[5] + given[7] - given[1] - 1;
        if (std::min(down, beside) < 0) refuse("Images of ", height, " × ", width, " are smaller than the kernel.");
        out = {down / given[2] + 1, beside / given[3] + 1};
    }
    const auto numbers = static_cast<unsigned __int128>(n) * integer("channels");
    for (const auto& size : {std::array{height, width}, out}) {
        const auto places = static_cast<unsigned __int128>(size[0]) * static_cast<uint64_t>(size[1]);
        if (places >= LIMIT || numbers * places >= LIMIT)
            refuse(n, " images of ", height, " × ", width, " have 2³¹ numbers or more.");
    }
    if (kind == "strip") {
        if (n > 65535) refuse(n, " images are more than 65535, the most of a launch.");
        const int64_t strips = quotient(width, integer("useful")), rows = integer("rows"), extra = integer("extra", 0);
        const int64_t slots = processors * integer("blocks");
        int64_t best = 0, least = std::numeric_limits<int64_t>::max();
        for (int64_t bands = 1; bands <= quotient(height, rows); ++bands) {
            const int64_t cost = quotient(strips * n * bands, slots) * quotient(quotient(height, bands) + extra, rows);
            if (cost < least) best = bands, least = cost;
        }
        const int64_t band = quotient(height, best);
        return {{strips, quotient(height, band), n}, {band}};
    }
    if (kind == "tile") {
        const int64_t places = n * out[0] * out[1];
        const int64_t together = rule.find("together") ? integer("together") : 1;  // blocks of a cluster
        const int64_t blocks = quotient(places, integer("places") * together) * together;
        return {{blocks, integer("across"), 1}, {places, out[0], out[1]}};
    }
    if (kind == "depthwise") {
        const int64_t work = n * out[0] * quotient(out[1], integer("places"));  // below 2³¹, and so are groups
        return {{quotient(work * integer("groups"), integer("threads")), 1, 1}, {n, out[0], out[1]}};
    }
    refuse("A launch of kind ", kind, ".");
}

// --------------------------------------------------------------------------------------------------- on GPUs
//
// Not verified: ran on no GPU yet.

class Driver {
  public:
    static const Driver& get() {
        static const Driver driver;
        return driver;
    }
    template <typename... Arguments>
    void call(const char* name, Arguments... arguments) const {
        auto* const function = reinterpret_cast<int (*)(Arguments...)>(symbol(name));
        if (const int result = function(arguments...)) {
            const char* word = nullptr;
            reinterpret_cast<int (*)(int, const char**)>(symbol("cuGetErrorName"))(result, &word);
            refuse("The CUDA driver refused ", name, ": ", word ? word : std::to_string(result), ".");
        }
    }
    int attribute(int device, int which) const {
        int found = 0;
        call("cuDeviceGetAttribute", &found, which, device);
        return found;
    }

  private:
    Driver() : library_(dlopen(BOLT_DRIVER, RTLD_NOW)) {
        if (!library_) refuse("No CUDA driver: ", BOLT_DRIVER, " cannot be loaded.");
        call("cuInit", 0u);
    }
    void* symbol(const char* name) const {
        if (void* found = dlsym(library_, name)) return found;
        refuse("The CUDA driver is too old: it has no ", name, ".");
    }

    void* library_;
};

class CudaKernel final : public Kernel {
  public:
    CudaKernel(const Api& api, const OrtKernelInfo* info, std::shared_ptr<const Bundle> bundle)
        : Kernel(api, info), bundle_(std::move(bundle)), driver_(Driver::get()) {
        int64_t index = 0;
        api.call(ATTRIBUTE_INTEGER, info, "region", &index);
        const Json& regions = bundle_->launches.at("regions");
        if (regions.kind != Json::LIST || index < 0 || static_cast<size_t>(index) >= regions.items.size())
            refuse(bundle_->path(), ": has no region ", index, ".");
        const Json& named = regions.items[static_cast<size_t>(index)];
        if (named.kind != Json::TEXT)
            refuse("The bundle has no kernel for region ", index, ": run its ONNX file without this library.");
        const std::string& name = named.text;
        const Json& entry = bundle_->launches.at("kernels").at(name);
        rule_ = &entry.at("rule");
        threads_ = static_cast<unsigned>(entry.at("threads").between("threads", 1, 1024));
        shared_ = static_cast<unsigned>(entry.at("shared_bytes").between("shared_bytes", 0, 1 << 24));
        entry.at("inputs").between("inputs", region.inputs(), region.inputs());
        try {
            prepare(name, index);
        } catch (...) {
            free();
            throw;
        }
    }
    ~CudaKernel() override { free(); }

    void compute(const Api& api, OrtKernelContext* context) override {
        std::vector<const void*> data;
        const Sizes sizes = this->sizes(api, context, data);
        void* output = output_of(api, context, sizes);
        if (sizes.empty) return;
        for (const void* one : data) check_aligned(one);
        check_aligned(output);
        const auto [height, width] = sizes.values[0];
        const Launch how = launch(*rule_, sizes.images, height, width, processors_);
        std::vector<int32_t> integers{static_cast<int32_t>(height), static_cast<int32_t>(width)};
        for (const int64_t one : how.integers) integers.push_back(static_cast<int32_t>(one));
        std::array<unsigned, 3> grid{};
        for (size_t axis = 0; axis < 3; ++axis) {
            if (how.grid[axis] >= int64_t{1} << 31) refuse("A launch of ", how.grid[axis], " blocks.");
            grid[axis] = static_cast<unsigned>(how.grid[axis]);
        }
        std::vector<void*> arguments;  // pointers to each: inputs, weights, integers, output
        for (const void*& one : data) arguments.push_back(&one);
        arguments.push_back(&weights_);
        for (int32_t& one : integers) arguments.push_back(&one);
        arguments.push_back(&output);
        void* stream = nullptr;
        api.call(CONTEXT_STREAM, static_cast<const OrtKernelContext*>(context), &stream);
        driver_.call("cuLaunchKernel", function_, grid[0], grid[1], grid[2], threads_, 1u, 1u, shared_, stream,
                     arguments.data(), static_cast<void**>(nullptr));
    }

  private:
    enum { PROCESSORS = 16, MAJOR = 75, MINOR = 76, MOST_SHARED = 97 };  // attributes of a device
    enum { DYNAMIC_SHARED = 8 };                                         // of a function

    // Of an array that a caller binds anything can be true, and a wrong address would end the whole context.
    static void check_aligned(const void* array) {
        if (reinterpret_cast<uintptr_t>(array) % 16) refuse("An array begins at no multiple of 16 bytes: copy it.");
    }

    // Loads machine code and weights into the context that ONNX Runtime has made current.
    void prepare(const std::string& name, int64_t index) {
        int device = 0;
        driver_.call("cuCtxGetCurrent", &context_);
        if (context_) {
            driver_.call("cuCtxGetDevice", &device);
        } else {
            driver_.call("cuDevicePrimaryCtxRetain", &context_, device);
            driver_.call("cuCtxSetCurrent", context_);
        }
        processors_ = driver_.attribute(device, PROCESSORS);
        const std::string code = this->code(name, driver_.attribute(device, MAJOR), driver_.attribute(device, MINOR));
        if (static_cast<int>(shared_) > driver_.attribute(device, MOST_SHARED))
            refuse("Kernel ", name, " takes ", shared_, " bytes of shared memory, more than this GPU has.");
        const std::string_view weights = bundle_->section("weights/" + std::to_string(index));
        driver_.call("cuModuleLoadData", &module_, static_cast<const void*>(code.c_str()));
        driver_.call("cuModuleGetFunction", &function_, module_, name.c_str());
        driver_.call("cuFuncSetAttribute", function_, int{DYNAMIC_SHARED}, static_cast<int>(shared_));
        driver_.call("cuMemAlloc_v2", &weights_, std::max<size_t>(weights.size(), 1));
        driver_.call("cuMemcpyHtoD_v2", weights_, static_cast<const void*>(weights.data()), weights.size());
    }
    // Machine code of this architecture, which may be for it alone ("a"), or of an earlier minor version; else PTX of the
    // newest architecture that is not newer, which the driver compiles if its version knows that.
    std::string code(const std::string& name, int major, int minor) const {
        const int version = 10 * major + minor;
        const auto key = [&](const char* kind, int one) { return kind + name + "/sm_" + std::to_string(one); };
        std::vector<std::string> keys{key("cubin/", version) + "a"};
        for (int one = version; one >= 10 * major; --one) keys.push_back(key("cubin/", one));
        for (int one = version; one > 0; --one) keys.push_back(key("ptx/", one));
        for (const std::string& one : keys)
            if (bundle_->has(one)) return std::string(bundle_->section(one));
        refuse(bundle_->path(), ": has no code of ", name, " for this GPU, sm_", version, ".");
    }
    void free() noexcept {
        try {
            if (context_) driver_.call("cuCtxSetCurrent", context_);
            if (weights_) driver_.call("cuMemFree_v2", weights_);
            if (module_) driver_.call("cuModuleUnload", module_);
        } catch (const std::exception&) {  // the process ends, and the driver has ended already
        }
    }

    std::shared_ptr<const Bundle> bundle_;
    const Driver& driver_;
    const Json* rule_ = nullptr;
    unsigned threads_ = 0, shared_ = 0;
    int64_t processors_ = 1;
    void *context_ = nullptr, *module_ = nullptr, *function_ = nullptr;
    unsigned long long weights_ = 0;
};

// --------------------------------------------------------------------------------------------------- the operator

// Operators of sessions that name the same bundle, or none.
struct Registration;

struct Operator : OrtCustomOp {
    Registration* home = nullptr;
    int type = FLOAT;
    bool cuda = false;
};

struct Registration {
    std::string path;
    std::array<Operator, 3> operators;
    OrtCustomOpDomain* domain = nullptr;
    std::mutex mutex;
    std::weak_ptr<const Bundle> bundle;  // kept by kernels

    std::shared_ptr<const Bundle> loaded() {
        const std::lock_guard lock(mutex);
        auto found = bundle.lock();
        const char* const named = path.empty() ? std::getenv("KERAS_EFFICIENT_BOLT_BUNDLE") : path.c_str();
        if (!named || !*named)
            refuse("Which bundle has the kernels? Set the session's entry keras_efficient.bolt.bundle, or the "
                   "variable KERAS_EFFICIENT_BOLT_BUNDLE, to its path.");
        if (!found || !found->is(named)) bundle = found = std::make_shared<const Bundle>(named);
        return found;
    }
};

std::atomic<void* const*> table = nullptr;  // of ONNX Runtime, which not all calls are given; always the same

template <typename Function>
OrtStatus* guarded(const Api& api, Function function) noexcept {
    try {
        function();
        return nullptr;
    } catch (const std::bad_alloc&) {
        return api.status("keras_efficient.bolt: out of memory.");
    } catch (const std::exception& error) {
        return api.status((std::string("keras_efficient.bolt: ") + error.what()).c_str());
    }
}

OrtStatus* create(const OrtCustomOp* given, void* const* functions, const OrtKernelInfo* info, void** kernel) {
    const Api api(functions);
    return guarded(api, [&] {
        const auto& self = *static_cast<const Operator*>(given);
        std::unique_ptr<Kernel> found;
        if (self.cuda)
            found = std::make_unique<CudaKernel>(api, info, self.home->loaded());
        else if (self.type == FLOAT)
            found = std::make_unique<CpuKernel<float>>(api, info);
        else
            found = std::make_unique<CpuKernel<_Float16>>(api, info);
        *kernel = found.release();
    });
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
    const Api api(table);
    return guarded(api, [&] { static_cast<Kernel*>(kernel)->compute(api, context); });
}

// A size that is known, or has a name; equal names are equal sizes.
struct Size {
    int64_t number = -1;
    std::string name;
};

Size output_size(const Region& region, const Size& given, int axis) {
    std::vector<Size> values(region.channels.size(), given);
    for (const Layer& layer : region.layers) {
        Size size = values[static_cast<size_t>(layer.value)];
        const int64_t more = layer.zeros(axis) - layer.reach(axis), stride = layer.stride[axis];
        if (size.number >= 0)
            size.number = size.number + more < 1 ? -1 : (size.number + more - 1) / stride + 1;
        else if (more != 0 || stride != 1)
            size.name = "floor((" + size.name + " + " + text(more - 1) + ")/" + text(stride) + ") + 1";
        values.push_back(size);
    }
    Size found = values.back();
    if (found.number >= 0)
        found.number *= region.shuffle;
    else if (region.shuffle > 1)
        found.name = text(region.shuffle) + "*(" + found.name + ")";
    return found;
}

// The output's shape, where the input's is known; what is wrong is told when the kernel is made.
void inferred(const Api& api, OrtShapeInferContext* given) {
    const auto* const context = static_cast<const OrtShapeInferContext*>(given);
    const OrtOpAttr* attribute = nullptr;
    api.call(INFER_ATTRIBUTE, context, "spec", &attribute);
    std::string spec(LONGEST_TEXT + 1, '\0');
    size_t size = 0;
    api.call(READ_ATTRIBUTE, attribute, int{ATTRIBUTE_TEXT}, static_cast<void*>(spec.data()), spec.size(), &size);
    const Region region = parsed_region(spec.c_str());
    OrtTensorTypeAndShapeInfo* input = nullptr;
    api.call(INFER_INPUT, context, size_t{0}, &input);
    const Shape shape = api.shape(static_cast<const OrtTensorTypeAndShapeInfo*>(input), true);
    if (region.rows ? shape.sizes.empty() : shape.sizes.size() != 4) return;
    std::vector<Size> sizes;
    for (size_t axis = 0; axis < shape.sizes.size(); ++axis) sizes.push_back({shape.sizes[axis], shape.names[axis]});
    const int64_t filters = region.layers.back().filters / (region.shuffle * region.shuffle);
    sizes.back() = {filters, ""};
    for (const int axis : {0, 1})
        if (auto& one = sizes[static_cast<size_t>(axis + 1)]; !region.rows) {
            if ((one.number < 0 && one.name.empty()) || one.number > MOST_NUMBERS) return;
            one = output_size(region, one, axis);
        }
    std::vector<int64_t> numbers;
    std::vector<const char*> names;
    for (const Size& one : sizes) {
        if (one.number < 0 && (one.name.empty() || one.name.size() > 200)) return;  // there is no shape in part
        numbers.push_back(one.number);
        names.push_back(one.number < 0 ? one.name.c_str() : "");
    }
    OrtTensorTypeAndShapeInfo* made = nullptr;
    api.call(CREATE_SHAPE, &made);
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owner(
        made, [](OrtTensorTypeAndShapeInfo* one) { Api(table).release(one); });
    api.call(SET_TYPE, made, shape.type);
    api.call(SET_DIMENSIONS, made, static_cast<const int64_t*>(numbers.data()), numbers.size());
    api.call(SET_SYMBOLIC, made, names.data(), names.size());
    api.call(INFER_OUTPUT, context, size_t{0}, static_cast<const OrtTensorTypeAndShapeInfo*>(made));
}

OrtStatus* infer(const OrtCustomOp*, OrtShapeInferContext* context) {
    try {
        inferred(Api(table), context);
    } catch (const std::exception&) {  // ONNX Runtime does not read a status of this function
    }
    return nullptr;
}

void fill(Operator& self, Registration& home, int type, bool cuda) {
    const auto type_of = [](const OrtCustomOp* one, size_t) { return static_cast<const Operator*>(one)->type; };
    const auto one_formal = [](const OrtCustomOp*) -> size_t { return 1; };
    const auto one = [](const OrtCustomOp*) { return 1; };
    static_cast<OrtCustomOp&>(self) = {
        .version = API_VERSION,
        .create_kernel = nullptr,
        .name = [](const OrtCustomOp*) { return "Fused"; },
        .provider = [](const OrtCustomOp* op) -> const char* {
            return static_cast<const Operator*>(op)->cuda && !BOLT_CUDA_ON_CPU ? "CUDAExecutionProvider" : nullptr;
        },
        .input_type = type_of,
        .input_count = one_formal,
        .output_type = type_of,
        .output_count = one_formal,
        .compute = nullptr,
        .destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); },
        .input_characteristic = [](const OrtCustomOp*, size_t) -> int { return VARIADIC; },
        .output_characteristic = [](const OrtCustomOp*, size_t) -> int { return REQUIRED; },
        .input_memory = [](const OrtCustomOp*, size_t) { return 0; },
        .least_inputs = one,
        .same_inputs = one,
        .least_outputs = one,
        .same_outputs = one,
        .create_kernel_2 = &create,
        .compute_2 = &compute,
        .infer_shape = &infer,
        .start_version = one,
        .end_version = [](const OrtCustomOp*) { return std::numeric_limits<int>::max(); },
    };
    self.home = &home;
    self.type = type;
    self.cuda = cuda;
}

void registered(const Api& api, OrtSessionOptions* options) {
    const char* const entry = "keras_efficient.bolt.bundle";
    std::string path;
    int known = 0;
    api.call(HAS_CONFIG, static_cast<const OrtSessionOptions*>(options), entry, &known);
    if (known) {
        size_t size = 0;
        api.call(GET_CONFIG, static_cast<const OrtSessionOptions*>(options), entry, static_cast<char*>(nullptr), &size);
        path.resize(size);
        api.call(GET_CONFIG, static_cast<const OrtSessionOptions*>(options), entry, path.data(), &size);
        path.resize(std::strlen(path.c_str()));
    }
    // Never freed, some hundred bytes for each path: sessions may outlive whatever would do it. Bundles are kernels'.
    static auto& mutex = *new std::mutex;
    static auto& all = *new std::map<std::string, std::unique_ptr<Registration>>;
    const std::lock_guard lock(mutex);
    auto& found = all[path];
    if (!found) {
        auto made = std::make_unique<Registration>();
        made->path = path;
        fill(made->operators[0], *made, FLOAT, false);
        fill(made->operators[1], *made, FLOAT16, false);
        fill(made->operators[2], *made, FLOAT16, true);
        api.call(CREATE_DOMAIN, "keras_efficient.bolt", &made->domain);
        for (const Operator& one : made->operators)
            if (!BOLT_CUDA_ON_CPU || one.type == FLOAT || one.cuda)
                api.call(DOMAIN_ADD, made->domain, static_cast<const OrtCustomOp*>(&one));
        found = std::move(made);
    }
    api.call(ADD_DOMAIN, options, found->domain);
}

}  // namespace

#define BOLT_EXPORT extern "C" __attribute__((visibility("default")))

// What ONNX Runtime calls when the library is registered with a session's options.
BOLT_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    void* const* const found = base->get_api(API_VERSION);
    if (!found) {
        const std::string line = std::string("keras_efficient.bolt: ONNX Runtime ") + base->version() +
                                 " is too old: release 1.17 or later is needed.";
        return Api(base->get_api(1)).status(line.c_str());
    }
    table = found;
    const Api api(found);
    return guarded(api, [&] { registered(api, options); });
}

// For tests: the launch of a rule in JSON. `found` takes the grid, then how many integers there are, then these.
BOLT_EXPORT int keras_efficient_bolt_launch(const char* rule, int64_t n, int64_t height, int64_t width,
                                            int64_t processors, int64_t found[8], char message[600]) try {
    const Launch how = launch(JsonReader(rule).read(), n, height, width, processors);
    std::copy(how.grid.begin(), how.grid.end(), found);
    found[3] = static_cast<int64_t>(how.integers.size());
    std::copy(how.integers.begin(), how.integers.end(), found + 4);
    return 0;
} catch (const std::exception& error) {
    std::snprintf(message, 600, "%s", error.what());
    return 1;
}

// For tests: whether a region's structure is accepted.
BOLT_EXPORT int keras_efficient_bolt_accepts(const char* spec, char message[600]) try {
    parsed_region(spec);
    return 1;
} catch (const std::exception& error) {
    std::snprintf(message, 600, "%s", error.what());
    return 0;
}

// For tests: how many sections a bundle has, -1 where it is refused.
BOLT_EXPORT int keras_efficient_bolt_sections(const char* path, char message[600]) try {
    return static_cast<int>(Bundle(path).count());
} catch (const std::exception& error) {
    std::snprintf(message, 600, "%s", error.what());
    return -1;
}

// For tests: how many bundles are in memory.
BOLT_EXPORT int keras_efficient_bolt_bundles() { return Bundle::alive; }
