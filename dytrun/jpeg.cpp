// A part of a JPEG, by the libjpeg-turbo that Pillow brings: what lies outside is not transformed, and what lies below is
// not read at all. The library is there without its header, so what is used of its interface is declared here: that of
// version 6.2, which has not changed since 1998. Another one refuses by itself, comparing its version and the size of its
// structure with ours (jpeg_CreateDecompress), and is not used then.

#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <dlfcn.h>

namespace {

constexpr int VERSION = 62;
constexpr size_t STRUCT_BYTES = 632;  // of jpeg_decompress_struct where pointers have eight bytes
enum ColorSpace { GRAYSCALE = 1, RGB = 2, YCBCR = 3 };

struct Decoder;

// The beginning of jpeg_error_mgr, room for the rest of it, and what is ours.
struct Errors {
    void (*exit)(Decoder*);
    void (*emit)(Decoder*, int level);
    void (*output)(Decoder*);
    char rest[488];
    jmp_buf after;
    bool has_warned;
};

// The beginning of jpeg_decompress_struct, up to the last member that is used here.
struct Decoder {
    Errors* errors;
    void *memory, *progress, *client;
    int is_decompressor, state;
    void* source;
    unsigned width, height;
    int components;
    int color_space, out_color_space;
    unsigned scale_num, scale_denom;
    double gamma;
    int buffered, raw, dct, fancy_upsampling, block_smoothing, quantize, dither, two_pass, colors, one_pass_quantizer,
        external_quantizer, two_pass_quantizer;
    unsigned out_width, out_height;
    int out_color_components, out_components, rec_outbuf_height, actual_colors;
    void* colormap;
    unsigned out_row;
    char rest[STRUCT_BYTES];
};

struct Library {
    Errors* (*std_error)(Errors*);
    void (*create)(Decoder*, int version, size_t bytes);
    void (*mem_src)(Decoder*, const uint8_t*, unsigned long);
    int (*read_header)(Decoder*, int require_image);
    int (*start)(Decoder*);
    void (*crop_scanline)(Decoder*, unsigned* left, unsigned* width);
    unsigned (*skip_scanlines)(Decoder*, unsigned);
    unsigned (*read_scanlines)(Decoder*, uint8_t** rows, unsigned);
    void (*destroy)(Decoder*);
} library;

void give_up(Decoder* decoder) { longjmp(decoder->errors->after, 1); }
void note(Decoder* decoder, int level) { decoder->errors->has_warned |= level < 0; }
void say_nothing(Decoder*) {}

template <typename Function>
bool find(void* from, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(from, name));
    return function != nullptr;
}

struct Part {
    int top, left, height, width;          // that is asked for
    int image_height, image_width;         // as the caller knows it
    int unit_height, unit_width;           // pixels that are coded together (an iMCU)
    int out_left, out_width;               // columns that were decoded
};

bool decode(Decoder& decoder, const uint8_t* data, int64_t bytes, Part& part, uint8_t* out, int64_t room,
            uint8_t* scratch) {
    library.create(&decoder, VERSION, STRUCT_BYTES);
    library.mem_src(&decoder, data, (unsigned long)bytes);
    library.read_header(&decoder, 1);
    const bool is_known = (decoder.components == 3 && decoder.color_space == YCBCR) ||
                          (decoder.components == 1 && decoder.color_space == GRAYSCALE);
    if (!is_known || int(decoder.width) != part.image_width || int(decoder.height) != part.image_height) return false;
    decoder.out_color_space = RGB;
    library.start(&decoder);
    // A pixel's colour is interpolated from the next ones, so one unit more is decoded on every side.
    const int first = part.left > part.unit_width ? part.left - part.unit_width : 0;
    const int last = part.left + part.width + part.unit_width;
    unsigned left = unsigned(first), width = unsigned((last < part.image_width ? last : part.image_width) - first);
    library.crop_scanline(&decoder, &left, &width);
    part.out_left = int(left);
    part.out_width = int(width);
    if (int64_t(width) * part.height * 3 > room || int(width) > part.image_width) return false;
    const int above = part.top > part.unit_height ? part.top - part.unit_height : 0;
    if (above >= part.unit_height) library.skip_scanlines(&decoder, unsigned(above / part.unit_height * part.unit_height));
    while (int(decoder.out_row) < part.top + part.height) {
        const int row = int(decoder.out_row) - part.top;
        uint8_t* to = row < 0 ? scratch : out + int64_t(row) * width * 3;
        if (library.read_scanlines(&decoder, &to, 1) != 1) return false;
    }
    return !decoder.errors->has_warned;
}

// Whether `work` does it on a decoder of its own, without an error of the library.
template <typename Work>
bool guarded(const Work& work) {
    Errors errors;
    Decoder decoder = {};
    decoder.errors = library.std_error(&errors);
    errors.exit = give_up;
    errors.emit = note;
    errors.output = say_nothing;
    errors.has_warned = false;
    volatile bool is_done = false;
    if (setjmp(errors.after) == 0) is_done = work(decoder);
    if (decoder.memory) library.destroy(&decoder);
    return is_done;
}

}  // namespace

extern "C" {

// Finds the library among those that `path`, Pillow's own, is linked to, and asks it whether it has this interface.
int jpeg_open(const char* path) {
    void* from = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    const bool is_found =
        sizeof(void*) == 8 && from && find(from, "jpeg_std_error", library.std_error) &&
        find(from, "jpeg_CreateDecompress", library.create) && find(from, "jpeg_mem_src", library.mem_src) &&
        find(from, "jpeg_read_header", library.read_header) && find(from, "jpeg_start_decompress", library.start) &&
        find(from, "jpeg_crop_scanline", library.crop_scanline) &&
        find(from, "jpeg_skip_scanlines", library.skip_scanlines) &&
        find(from, "jpeg_read_scanlines", library.read_scanlines) &&
        find(from, "jpeg_destroy_decompress", library.destroy);
    return is_found && guarded([](Decoder& decoder) {
               library.create(&decoder, VERSION, STRUCT_BYTES);
               return true;
           });
}

// Returns whether it was decoded without error and warning; `scratch` has room for a row of the image.
int jpeg_part(const uint8_t* data, int64_t bytes, Part* part, uint8_t* out, int64_t room, uint8_t* scratch) {
    return guarded([&](Decoder& decoder) { return decode(decoder, data, bytes, *part, out, room, scratch); });
}
}
