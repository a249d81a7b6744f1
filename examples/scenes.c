/* scenes.c - a small world to learn from: pictures with exact annotations, as many as wanted.

       cc -O3 -ffp-contract=off -o scenes examples/scenes.c -lm -lpthread
       ./scenes world/depth --kind depth --count 1000 --seed 1

   Lit scenes of balls, boxes, cylinders, cones and jointed figures, at rest and moving; puzzles,
   mazes and frozen lakes. Since the program knows where everything is, depth, normals, classes,
   outlines, boxes and key points come with the pictures, right to the pixel. What it writes are
   folders of PNG files with COCO's JSON or lists of names beside them, in the layouts that
   `lvm sentences` reads; `./scenes --help` shows them all.

   Contents
       1  Chance            numbers from a seed; what is held out
       2  Geometry          vectors; the four solids and where a ray enters them
       3  Scenes            things, ground, light and camera, drawn by chance
       4  Figures           a pose becomes 18 points and 13 solids
       5  Rendering         what each pixel sees, and its colour
       6  Annotations       depth, normals, classes, outlines, drawings, boxes, key points
       7  Flat pictures     shapes on paper: progressions, counting, Raven's matrices
       8  Boards            mazes and frozen lakes, and their shortest paths
       9  PNG               filters, Huffman codes, checksums
      10  Kinds             what is written for each kind of data; the table of kinds
      11  The program       threads, lists, options

   The same seed gives the same bytes with any number of threads: an item depends on the seed and on
   its own number alone. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _WIN32
#include <direct.h>
#endif

/* =================================================================================================
   1.  Chance

   splitmix64 (Steele, Lea and Flood 2014): a counter goes through a mixing function. Each item has
   a counter of its own, so that items can be drawn in any order.

   Held out is decided by what was drawn, not by the number it was drawn with: an item's description
   is hashed, and one hash in eight belongs to the held-out world. A draw on the wrong side is drawn
   anew. So no scene, matrix, progression or board of one side ever appears on the other, whatever
   the seeds, even where there are only so many different ones. (Single pictures of flat puzzles do:
   all matrices share one table of panels. What is new in a held-out puzzle is the sentence.) */

struct chance {
    uint64_t counter;
};

static uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t next_number(struct chance *c) { return mix(c->counter += 0x9e3779b97f4a7c15u); }

static struct chance chance_of(uint64_t seed, int kind, int item) {
    uint64_t place = (uint64_t)kind << 32 | (uint32_t)item;
    return (struct chance){mix(mix(seed + 0x9e3779b97f4a7c15u) ^ mix(place + 1))};
}

/* A float in [lo, hi). */
static float between(struct chance *c, float lo, float hi) {
    return lo + (hi - lo) * (float)(next_number(c) >> 40) * 0x1p-24f;
}

/* An integer in [0, n). */
static int below(struct chance *c, int n) {
    return (int)((next_number(c) >> 32) * (uint64_t)n >> 32);
}

/* The numbers 0 .. n-1 in random order (Fisher and Yates). */
static void shuffled(struct chance *c, int *order, int n) {
    for (int i = 0; i < n; i++) {
        int j = below(c, i + 1);
        order[i] = order[j];
        order[j] = i;
    }
}

static int is_held_out(const void *description, size_t size) {
    const uint8_t *byte = description;
    uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a */
    for (size_t i = 0; i < size; i++) hash = (hash ^ byte[i]) * 0x100000001b3u;
    return mix(hash) % 8 == 0;
}

/* =================================================================================================
   2.  Geometry

   Four convex solids in the cube of side 2 around the origin: the ball, the box (the cube itself),
   and two that turn about the y axis with the radius r(y) = (1 - k) - k y: the cylinder (k = 0)
   and the cone (k = 1/2, its tip at y = 1). A thing in the world is one of them turned, stretched
   and moved; a ray is taken back into the solid's own coordinates, where equations are short. */

enum { BALL, BOX, CYLINDER, CONE, SOLIDS };

static const float pi = 3.14159265f;
static const float miss = 1e9f; /* the distance of what is not met */

typedef struct {
    float x, y, z;
} vec;

static vec add(vec a, vec b) { return (vec){a.x + b.x, a.y + b.y, a.z + b.z}; }
static vec minus(vec a, vec b) { return (vec){a.x - b.x, a.y - b.y, a.z - b.z}; }
static vec times(vec a, float s) { return (vec){a.x * s, a.y * s, a.z * s}; }
static vec along(vec a, vec d, float t) { return add(a, times(d, t)); }
static float dot(vec a, vec b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
static vec unit(vec a) { return times(a, 1 / sqrtf(dot(a, a))); }
static vec blend(vec a, vec b, float s) { return along(times(a, 1 - s), b, s); }
static vec cross(vec a, vec b) {
    return (vec){a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}

static float clamp(float x, float lo, float hi) { return x < lo ? lo : x > hi ? hi : x; }
static int clamp_int(int x, int lo, int hi) { return x < lo ? lo : x > hi ? hi : x; }
static float larger(float a, float b) { return a > b ? a : b; }
static int floor_int(float x) { return (int)x - (x < (float)(int)x); }

/* Goes from 0 to 1 and back with period 1. */
static float to_and_fro(float x) { return fabsf(2 * (x - (float)floor_int(x)) - 1); }

/* Where the ray o + t d enters the ball |p| = 1: a t^2 + 2 b t + c = 0. */
static float enter_ball(vec o, vec d) {
    float a = dot(d, d), b = dot(o, d), h = b * b - a * (dot(o, o) - 1);
    return h > 0 ? (-b - sqrtf(h)) / a : miss;
}

/* The part [*in, *out] of a ray in which its coordinate o + t d lies between -1 and 1. */
static void slab(float o, float d, float *in, float *out) {
    float inverse = 1 / d, s = (-1 - o) * inverse, t = (1 - o) * inverse;
    *in = s < t ? s : t;
    *out = s < t ? t : s;
}

/* The box is what three slabs share. */
static float enter_box(vec o, vec d) {
    float in, out, in2, out2, in3, out3;
    slab(o.x, d.x, &in, &out);
    slab(o.y, d.y, &in2, &out2);
    slab(o.z, d.z, &in3, &out3);
    if (in2 > in) in = in2;
    if (in3 > in) in = in3;
    if (out2 < out) out = out2;
    if (out3 < out) out = out3;
    return in < out ? in : miss;
}

/* Cylinder and cone: the slab of y, and x^2 + z^2 < r(y)^2, which is a t^2 + 2 b t + c < 0. Of a
   cone that is true outside the two roots when the ray is steeper than the cone's side (a < 0). */
static float enter_turned(vec o, vec d, float k) {
    float in, out, r = 1 - k - k * o.y;
    float a = d.x * d.x + d.z * d.z - k * k * d.y * d.y;
    float b = o.x * d.x + o.z * d.z + k * r * d.y;
    float h = b * b - a * (o.x * o.x + o.z * o.z - r * r);
    slab(o.y, d.y, &in, &out);
    if (in >= out || (h <= 0 && a >= 0)) return miss;
    if (h <= 0) return in;
    float root = sqrtf(h), s = (-b - root) / a, t = (-b + root) / a; /* a < 0: t < s */
    if (a > 0) {
        if (s > in) in = s;
        if (t < out) out = t;
    } else if (in > t && s > in) {
        in = s;
    }
    return in < out ? in : miss;
}

static inline float enter(int solid, vec o, vec d) {
    switch (solid) {
    case BALL: return enter_ball(o, d);
    case BOX: return enter_box(o, d);
    case CYLINDER: return enter_turned(o, d, 0);
    default: return enter_turned(o, d, .5f);
    }
}

/* The normal at p on a solid, of any length, and which of its smooth faces p lies on. */
static vec solid_normal(int solid, vec p, int *face) {
    float x = fabsf(p.x), y = fabsf(p.y), z = fabsf(p.z), k = solid == CONE ? .5f : 0;
    *face = 0;
    if (solid == BALL) return p;
    if (solid == BOX) {
        int axis = x > y && x > z ? 0 : y > z ? 1 : 2;
        float side = axis == 0 ? p.x : axis == 1 ? p.y : p.z;
        *face = 1 + 2 * axis + (side > 0);
        side = side > 0 ? 1 : -1;
        return (vec){axis == 0 ? side : 0, axis == 1 ? side : 0, axis == 2 ? side : 0};
    }
    *face = p.y < -.9995f ? 1 : p.y > .9995f && solid == CYLINDER ? 2 : 0;
    if (*face != 0) return (vec){0, *face == 1 ? -1 : 1, 0};
    return (vec){p.x, k * (1 - k - k * p.y), p.z};
}

/* =================================================================================================
   3.  Scenes

   A scene says all that a picture shows; chance decides it once, and a motion moves it from frame
   to frame. All members of a description are four bytes wide and zero where unused, so that equal
   descriptions are equal bytes. Lengths are in units of about a metre; y points up; the ground is
   y = 0. */

enum { MAX_THINGS = 20, POINTS = 18, PARTS = 13 };
enum { SKY, FIGURE = SOLIDS + 1, GROUND, CLASSES }; /* classes; a solid's is its number + 1 */
enum { PLAIN, STRIPES, CHECKER, DOTS, CLOUDS };

static const char *const class_names[CLASSES] = {"sky",  "ball",   "box",   "cylinder",
                                                 "cone", "figure", "ground"};

struct thing {
    int solid;
    int class;
    int instance;    /* the parts of a figure are one */
    vec centre, size;
    vec axis[3];     /* the solid's x, y, z in the world: orthonormal */
    vec colour, second;
    int pattern;
    float frequency; /* of the pattern: cells a unit */
    float shine;
};

struct camera {
    float azimuth, elevation, distance; /* from the target */
    float field;                        /* of view, in radians, of the whole side */
    vec target;
};

/* Angles of a figure. Of a limb: forward swing, sideways spread, bend of the elbow or knee. */
struct pose {
    float yaw, lean, bow, scale, x, z;
    float arm[2][3], leg[2][3]; /* the right one first */
    vec skin, shirt, trousers;
};

struct scene {
    int n;                            /* things, a figure's parts not counted */
    struct thing things[MAX_THINGS];
    int has_figure;
    struct pose pose;
    struct camera camera;
    int has_ground, pattern;
    vec ground, second;
    float frequency;
    vec low_sky, high_sky, light;     /* light: the direction it comes from */
    float ambient;
};

/* A colour from hue, saturation and value (Smith 1978), each in [0, 1]. */
static vec hsv(float h, float s, float v) {
    float rgb[3];
    for (int i = 0; i < 3; i++) {
        float k = fmodf((float)(5 - 2 * i) + 6 * h, 6); /* red 5, green 3, blue 1 */
        float m = k < 4 - k ? k : 4 - k;
        rgb[i] = v * (1 - s * clamp(m, 0, 1));
    }
    return (vec){rgb[0], rgb[1], rgb[2]};
}

/* A colour with each of the three in a range. (Chance is asked in separate statements everywhere:
   C leaves open in which order a function's arguments are evaluated.) */
static vec hue_of(struct chance *c, float h0, float h1, float s0, float s1, float v0, float v1) {
    float h = between(c, h0, h1), s = between(c, s0, s1);
    return hsv(h, s, between(c, v0, v1));
}

static vec any_colour(struct chance *c) { return hue_of(c, 0, 1, .5f, .95f, .65f, 1); }

static void turn_to(struct thing *t, float yaw) {
    t->axis[0] = (vec){cosf(yaw), 0, -sinf(yaw)};
    t->axis[1] = (vec){0, 1, 0};
    t->axis[2] = (vec){sinf(yaw), 0, cosf(yaw)};
}

/* A thing that stands on the ground at (x, z). */
static void draw_thing(struct chance *c, struct thing *t, int solid, float x, float z) {
    static const int patterns[] = {PLAIN, PLAIN, PLAIN, STRIPES, CHECKER, DOTS};
    float r = between(c, .28f, .46f), h = between(c, .28f, .6f), depth = between(c, .24f, .38f);
    t->solid = solid;
    t->class = solid + 1;
    t->size = (vec){r, h, r};
    if (solid == BALL) t->size = (vec){r, r, r};
    if (solid == BOX) t->size = (vec){r < .38f ? r : .38f, h, depth};
    t->centre = (vec){x, t->size.y, z};
    turn_to(t, between(c, 0, 2 * pi));
    t->colour = any_colour(c);
    t->second = any_colour(c);
    t->pattern = patterns[below(c, 6)];
    t->frequency = between(c, 3, 6);
    t->shine = below(c, 5) < 3 ? between(c, .1f, .6f) : 0;
}

/* lo to hi things on a loose grid of three by three, so that none stands in another; all of one
   solid, or any where solid is negative. */
static void draw_things(struct chance *c, struct scene *s, int lo, int hi, int solid) {
    int cells[9];
    shuffled(c, cells, 9);
    s->n = lo + below(c, hi - lo + 1);
    for (int i = 0; i < s->n; i++) {
        float x = 1.2f * (float)(cells[i] % 3 - 1) + between(c, -.08f, .08f);
        float z = 1.2f * (float)(cells[i] / 3 - 1) + between(c, -.08f, .08f);
        draw_thing(c, &s->things[i], solid < 0 ? below(c, SOLIDS) : solid, x, z);
        s->things[i].instance = i;
    }
}

static vec direction(float azimuth, float elevation) {
    float level = cosf(elevation);
    return (vec){level * sinf(azimuth), sinf(elevation), level * cosf(azimuth)};
}

/* Ground, sky, light and a camera that looks down on things around the origin. */
static void draw_surroundings(struct chance *c, struct scene *s) {
    static const int patterns[] = {PLAIN, PLAIN, STRIPES, CHECKER, CLOUDS, DOTS};
    float hue = between(c, 0, 1), value = between(c, .4f, .85f), other = between(c, -.22f, .22f);
    float az = between(c, 0, 2 * pi), el = between(c, .28f, .75f), distance = between(c, 5, 6.4f);
    s->camera = (struct camera){az, el, distance, between(c, .68f, .82f), {0, .35f, 0}};
    s->has_ground = 1;
    s->pattern = patterns[below(c, 6)];
    s->frequency = between(c, .6f, 1.3f);
    s->ground = hsv(hue, between(c, .05f, .4f), value);
    s->second = hsv(hue, between(c, .05f, .4f), clamp(value + other, .2f, 1));
    s->low_sky = hue_of(c, 0, 1, .05f, .3f, .75f, 1);
    s->high_sky = hue_of(c, .5f, .7f, .2f, .6f, .5f, .95f);
    az += between(c, -1.8f, 1.8f); /* the light does not come from behind the things */
    s->light = direction(az, between(c, .65f, 1.15f));
    s->ambient = between(c, .38f, .55f);
}

/* An object of a few parts that hangs in front of one colour, to be turned. */
static void draw_object(struct chance *c, struct scene *s) {
    draw_surroundings(c, s);
    draw_things(c, s, 2, 4, -1);
    for (int i = 0; i < s->n; i++) {
        s->things[i].size = times(s->things[i].size, .62f);
        s->things[i].frequency *= 1.4f;
        s->things[i].centre.x = between(c, -.3f, .3f);
        s->things[i].centre.y = between(c, -.26f, .26f);
        s->things[i].centre.z = between(c, -.3f, .3f);
    }
    s->has_ground = s->pattern = 0;
    float most = below(c, 10) < 7 ? 0 : .4f; /* mostly grey or white */
    s->low_sky = s->high_sky = hue_of(c, 0, 1, .1f * most, most, .75f, 1);
    s->camera.elevation = between(c, -.6f, .78f);
    s->camera.distance = between(c, 1.5f, 2.2f);
    s->camera.field = .95f;
    s->camera.target = (vec){0, 0, 0};
    s->ambient = between(c, .48f, .6f);
}

/* =================================================================================================
   4.  Figures

   The 18 points of OpenPose (Cao et al. 2017) from the angles of a pose. Trunk, head and limbs are
   long balls between points; eyes and a nose show where the figure looks. "Right" is the
   figure's own right. */

enum { NOSE, NECK, R_SHOULDER, R_ELBOW, R_WRIST, L_SHOULDER, L_ELBOW, L_WRIST, R_HIP, R_KNEE,
       R_ANKLE, L_HIP, L_KNEE, L_ANKLE, R_EYE, L_EYE, R_EAR, L_EAR };

static void draw_pose(struct chance *c, struct pose *p) {
    vec skin = {.92f, .72f, .58f};
    p->yaw = between(c, 0, 2 * pi);
    p->lean = between(c, -.16f, .16f);
    p->bow = between(c, -.1f, .3f);
    p->scale = between(c, .95f, 1.2f);
    p->x = between(c, -.35f, .35f);
    p->z = between(c, -.35f, .35f);
    for (int side = 0; side < 2; side++) {
        float *arm = p->arm[side], *leg = p->leg[side];
        arm[0] = between(c, -.8f, 2.3f), arm[1] = between(c, .12f, 1.2f);
        arm[2] = between(c, .1f, 1.6f);
        leg[0] = between(c, -.5f, .8f), leg[1] = between(c, .05f, .4f);
        leg[2] = between(c, 0, .9f);
    }
    p->skin = times(skin, between(c, .45f, 1.05f));
    p->shirt = any_colour(c);
    p->trousers = times(any_colour(c), .8f);
}

/* A step of a walk: what the right leg does the left arm does. phase goes from 0 to 1. */
static void walk(struct pose *p, float phase) {
    for (int side = 0; side < 2; side++) {
        float swing = sinf(2 * pi * (phase + .5f * (float)side));
        float lift = cosf(2 * pi * (phase + .5f * (float)side));
        p->leg[side][0] = .5f * swing, p->leg[side][1] = .04f;
        p->leg[side][2] = .15f + .65f * (lift > 0 ? lift : 0);
        p->arm[side][0] = -.55f * swing, p->arm[side][1] = .14f;
        p->arm[side][2] = .35f - .2f * swing;
    }
    p->lean = 0;
    p->bow = .05f;
}

/* Right, up and forward of a figure in the world. */
struct frame {
    vec right, up, forward;
};

/* A limb's direction: hanging down, swung forward by one angle and sideways by another. */
static vec hang(struct frame f, float swing, float spread, float side) {
    vec d = times(f.up, -cosf(spread) * cosf(swing));
    d = along(d, f.forward, cosf(spread) * sinf(swing));
    return along(d, f.right, side * sinf(spread));
}

static void limb_points(struct frame f, const float angle[3], float side, float bend, float upper,
                        float lower, vec p[3]) {
    p[1] = along(p[0], hang(f, angle[0], angle[1], side), upper);
    p[2] = along(p[1], hang(f, angle[0] + bend * angle[2], .5f * angle[1], side), lower);
}

/* points [POINTS] in the world; the lower ankle stands on the ground. The neck lies halfway between
   the shoulders, as programs assume that make OpenPose's points from COCO's. */
static void figure_points(const struct pose *q, vec *p) {
    struct frame f;
    f.forward = (vec){sinf(q->yaw), 0, cosf(q->yaw)};
    f.up = (vec){0, 1, 0};
    f.right = cross(f.forward, f.up);
    vec spine = unit(along(along(f.up, f.right, q->lean), f.forward, q->bow));
    vec head = times(spine, .72f);
    p[NECK] = times(spine, .5f);
    p[NOSE] = along(head, f.forward, .135f);
    for (int i = 0; i < 2; i++) {
        float side = i == 0 ? 1 : -1;
        vec *arm = p + (i == 0 ? R_SHOULDER : L_SHOULDER), *leg = p + (i == 0 ? R_HIP : L_HIP);
        arm[0] = along(p[NECK], f.right, .19f * side);
        limb_points(f, q->arm[i], side, 1, .29f, .27f, arm);
        leg[0] = times(f.right, .1f * side);
        limb_points(f, q->leg[i], side, -1, .42f, .42f, leg);
        p[R_EYE + i] = along(along(along(head, f.right, .048f * side), spine, .04f), f.forward,
                             .112f);
        p[R_EAR + i] = along(head, f.right, .118f * side);
    }
    float low = p[R_ANKLE].y < p[L_ANKLE].y ? p[R_ANKLE].y : p[L_ANKLE].y;
    for (int i = 0; i < POINTS; i++) {
        p[i] = times(add(p[i], (vec){0, .07f - low, 0}), q->scale);
        p[i] = add(p[i], (vec){q->x, 0, q->z});
    }
}

/* A long ball from a to b, which reaches beyond both by `over`. */
static struct thing part(vec a, vec b, float width, float depth, float over, vec colour) {
    vec d = minus(b, a), y = unit(d);
    vec other = fabsf(y.y) > .9f ? (vec){1, 0, 0} : (vec){0, 1, 0};
    vec x = unit(cross(other, y));
    struct thing t = {.solid = BALL, .class = FIGURE, .instance = MAX_THINGS, .colour = colour};
    t.centre = times(add(a, b), .5f);
    t.size = (vec){width, .5f * sqrtf(dot(d, d)) + over, depth};
    t.axis[0] = x, t.axis[1] = y, t.axis[2] = cross(x, y);
    return t;
}

/* The PARTS solids of a figure. */
static void figure_parts(const struct pose *q, const vec *p, struct thing *t) {
    float s = q->scale;
    vec hips = times(add(p[R_HIP], p[L_HIP]), .5f), up = unit(minus(p[NECK], hips));
    vec chin = along(p[NECK], up, .1f * s), crown = along(p[NECK], up, .34f * s);
    vec dark = {.08f, .06f, .06f}, flesh = q->skin;
    *t++ = part(along(hips, up, -.04f * s), p[NECK], .17f * s, .17f * s, .05f * s, q->shirt);
    *t++ = part(chin, crown, .125f * s, .125f * s, .03f * s, flesh);
    for (int side = 0; side < 2; side++) {
        const vec *arm = p + (side == 0 ? R_SHOULDER : L_SHOULDER);
        const vec *leg = p + (side == 0 ? R_HIP : L_HIP);
        *t++ = part(arm[0], arm[1], .068f * s, .068f * s, .05f * s, q->shirt);
        *t++ = part(arm[1], arm[2], .055f * s, .055f * s, .06f * s, flesh);
        *t++ = part(leg[0], leg[1], .095f * s, .095f * s, .06f * s, q->trousers);
        *t++ = part(leg[1], leg[2], .075f * s, .075f * s, .06f * s, q->trousers);
        *t++ = part(p[R_EYE + side], along(p[R_EYE + side], up, .001f), .021f * s, .021f * s,
                    .021f * s, dark);
    }
    *t = part(p[NOSE], along(p[NOSE], up, .001f), .025f * s, .025f * s, .03f * s,
              times(flesh, .85f));
}

/* A figure with up to two things beside or behind it; the camera is near. */
static void draw_figure_scene(struct chance *c, struct scene *s) {
    draw_surroundings(c, s);
    draw_pose(c, &s->pose);
    s->has_figure = 1;
    s->n = below(c, 3);
    for (int i = 0; i < s->n; i++) {
        float r = between(c, 1.2f, 1.6f), aside = between(c, 1.3f, 2.6f);
        float angle = s->camera.azimuth + (i == 0 ? aside : -aside);
        draw_thing(c, &s->things[i], below(c, SOLIDS), r * sinf(angle), r * cosf(angle));
        s->things[i].instance = i;
    }
    s->camera.elevation = between(c, .08f, .4f);
    s->camera.distance = between(c, 3.6f, 4.4f);
    s->camera.target.y = .78f;
}

/* Every third scene has a figure; the others are of things alone. */
static void draw_scene(struct chance *c, struct scene *s) {
    if (below(c, 3) == 0) {
        draw_figure_scene(c, s);
    } else {
        draw_surroundings(c, s);
        draw_things(c, s, 2, 5, -1);
    }
}

/* ---- Motion ----

   Three things on three lanes, so that they pass but never meet, or a figure that walks about;
   and a camera that may circle and come closer. */

enum { LANES = 3, STILL = 0, SLIDE, BOUNCE, TURN, MOTIONS };

struct motion {
    int of[LANES];
    float speed[LANES], phase[LANES], height[LANES];
    float circling, nearing; /* of the camera: radians a frame; share of the distance */
    float step;              /* of a walk: its share a frame */
};

static void draw_moving(struct chance *c, struct scene *s, struct motion *m) {
    int walks = below(c, 4) == 0;
    if (walks) {
        draw_figure_scene(c, s);
        m->step = between(c, .05f, .09f);
        s->pose.x = s->pose.z = 0;
    } else {
        draw_surroundings(c, s);
        draw_things(c, s, 2, LANES, -1);
    }
    for (int i = 0; i < LANES; i++) {
        m->of[i] = walks ? STILL : below(c, MOTIONS);
        m->speed[i] = between(c, .012f, .03f);
        m->phase[i] = between(c, 0, 1);
        m->height[i] = between(c, .4f, 1.1f);
        if (!walks) s->things[i].centre.z = 1.15f * (float)(i - 1);
    }
    if (below(c, 2) == 0) m->circling = between(c, -.09f, .09f);
    if (below(c, 2) == 0) m->nearing = between(c, -.15f, .15f);
}

static void move_thing(struct thing *t, const struct motion *m, int i, float frame) {
    float at = m->phase[i] + m->speed[i] * frame;
    if (m->of[i] == SLIDE) t->centre.x = 3 * to_and_fro(at) - 1.5f;
    if (m->of[i] == BOUNCE) t->centre.y += m->height[i] * fabsf(sinf(2 * pi * 2 * at));
    if (m->of[i] == TURN) turn_to(t, 2 * pi * at);
}

/* The scene at a frame of the motion. */
static struct scene moved(const struct scene *start, const struct motion *m, int frame) {
    struct scene s = *start;
    float f = (float)frame;
    if (!s.has_figure)
        for (int i = 0; i < s.n; i++) move_thing(&s.things[i], m, i, f);
    if (m->step > 0) { /* along a circle of radius 0.7, to the figure's left */
        float round = s.pose.yaw + 1.8f * m->step * f;
        walk(&s.pose, m->phase[0] + m->step * f);
        s.pose.yaw = round;
        s.pose.x = -.7f * cosf(round);
        s.pose.z = .7f * sinf(round);
    }
    s.camera.azimuth += m->circling * f;
    s.camera.distance *= 1 + m->nearing * sinf(.2f * f);
    return s;
}

/* =================================================================================================
   5.  Rendering

   Every pixel's ray is forward + X right + Y up from the eye, which is not made a unit vector: then
   the distance t along it is the depth z, exactly. First each solid is met with the rays of its
   rectangle on the screen and the nearest one is kept; then each pixel gets its colour, with one
   ray to the light. A pixel whose neighbour shows something else (another solid, face, side of a
   pattern or of a shadow) is drawn anew as the mean of four rays. Depths and identities stay those
   of the pixel's centre: annotations are never means of two surfaces.

   Light is Lambert's cosine law, an ambient part that prefers what looks up, and the highlight of
   Blinn (1977) with the exponent 40. */

enum { ON_GROUND = 254, ON_SKY = 255 };                       /* else the number of a thing */
enum { KEY_FACE = 1 << 8, KEY_CELL = 1 << 11, KEY_SHADOW = 1 << 12 }; /* over the number */

static const float far_ground = 40; /* beyond this depth there is haze */

/* A thing as one camera sees it: eye, ray and light in the solid's own coordinates. */
struct solid {
    const struct thing *thing;
    vec row[3];            /* the solid's coordinate i of a world vector v: dot(row[i], v) */
    vec eye, forward, right, up, light;
    float reach;           /* squared radius of a ball around it */
    int x0, y0, x1, y1;    /* the pixels that may show it: x0 <= x < x1 */
};

struct view {
    struct scene scene;
    int n;
    struct thing things[MAX_THINGS]; /* the figure's parts too */
    struct solid solids[MAX_THINGS];
    vec points[POINTS];
    vec middle;                      /* of a ball around all things */
    float reach;                     /* its squared radius */
    vec eye, forward, right, up;
    float pixel;                     /* size of a pixel at depth 1 */
    int side;
    float *depth;                    /* [side][side] each */
    uint16_t *key;
};

static vec inwards(const struct solid *s, vec v) {
    return (vec){dot(s->row[0], v), dot(s->row[1], v), dot(s->row[2], v)};
}

/* The pixel coordinates of a point, (0, 0) being the corner of the first pixel, and its depth. */
static float project(const struct view *v, vec p, float *x, float *y) {
    vec d = minus(p, v->eye);
    float z = dot(d, v->forward), scale = 1 / (v->pixel * z);
    *x = .5f * (float)v->side + dot(d, v->right) * scale;
    *y = .5f * (float)v->side - dot(d, v->up) * scale;
    return z;
}

/* The rectangle of the eight corners of a solid's cube; the whole screen if one is behind. */
static void bound(const struct view *v, struct solid *s) {
    const struct thing *t = s->thing;
    float x0 = miss, y0 = miss, x1 = -miss, y1 = -miss;
    s->x0 = s->y0 = 0;
    s->x1 = s->y1 = v->side;
    for (int i = 0; i < 8; i++) {
        float x, y;
        vec p = along(t->centre, t->axis[0], i & 1 ? t->size.x : -t->size.x);
        p = along(p, t->axis[1], i & 2 ? t->size.y : -t->size.y);
        p = along(p, t->axis[2], i & 4 ? t->size.z : -t->size.z);
        if (project(v, p, &x, &y) < .05f) return;
        x0 = x < x0 ? x : x0, x1 = x > x1 ? x : x1;
        y0 = y < y0 ? y : y0, y1 = y > y1 ? y : y1;
    }
    float side = (float)v->side;
    s->x0 = (int)clamp(x0 - 1, 0, side), s->x1 = (int)clamp(x1 + 2, 0, side);
    s->y0 = (int)clamp(y0 - 1, 0, side), s->y1 = (int)clamp(y1 + 2, 0, side);
}

static void place_solid(struct view *v, int i) {
    struct solid *s = &v->solids[i];
    const struct thing *t = s->thing = &v->things[i];
    s->row[0] = times(t->axis[0], 1 / t->size.x);
    s->row[1] = times(t->axis[1], 1 / t->size.y);
    s->row[2] = times(t->axis[2], 1 / t->size.z);
    s->eye = inwards(s, minus(v->eye, t->centre));
    s->forward = inwards(s, v->forward);
    s->right = inwards(s, v->right);
    s->up = inwards(s, v->up);
    s->light = inwards(s, v->scene.light);
    s->reach = dot(t->size, t->size);
    if (t->solid == BALL) {
        float r = t->size.x > t->size.y ? t->size.x : t->size.y;
        s->reach = r > t->size.z ? r * r : t->size.z * t->size.z;
    }
    bound(v, s);
}

/* The ball around all things, outside of whose shadow no point needs to look for one. */
static void embrace(struct view *v) {
    vec sum = {0, 0, 0};
    float radius = 0;
    for (int i = 0; i < v->n; i++) sum = add(sum, v->things[i].centre);
    v->middle = times(sum, 1 / (float)v->n);
    for (int i = 0; i < v->n; i++) {
        vec to = minus(v->things[i].centre, v->middle);
        radius = larger(radius, sqrtf(dot(to, to)) + sqrtf(v->solids[i].reach));
    }
    v->reach = radius * radius;
}

static void look(struct view *v, const struct scene *scene) {
    const struct camera *camera = &scene->camera;
    v->scene = *scene;
    v->n = scene->n;
    memcpy(v->things, scene->things, sizeof v->things);
    if (scene->has_figure) {
        figure_points(&scene->pose, v->points);
        figure_parts(&scene->pose, v->points, v->things + v->n);
        v->n += PARTS;
    }
    vec away = direction(camera->azimuth, camera->elevation);
    v->eye = along(camera->target, away, camera->distance);
    v->forward = times(away, -1);
    v->right = unit(cross(v->forward, (vec){0, 1, 0}));
    v->up = cross(v->right, v->forward);
    v->pixel = 2 * tanf(.5f * camera->field) / (float)v->side;
    for (int i = 0; i < v->n; i++) place_solid(v, i);
    embrace(v);
}

/* X or Y of the ray through a pixel coordinate. */
static float ray_x(const struct view *v, float x) { return (x - .5f * (float)v->side) * v->pixel; }
static float ray_y(const struct view *v, float y) { return -ray_x(v, y); }

/* Depth of the ground, which is the same all along a row, for the camera does not tilt. */
static float ground_depth(const struct view *v, float y) {
    float fall = -(v->forward.y + ray_y(v, y) * v->up.y);
    if (!v->scene.has_ground || fall * far_ground <= v->eye.y) return miss;
    return v->eye.y / fall;
}

/* The first thing that a ray meets before depth z. */
static float nearest(const struct view *v, float x, float y, float z, int *seen) {
    float rx = ray_x(v, x), ry = ray_y(v, y);
    for (int i = 0; i < v->n; i++) {
        const struct solid *s = &v->solids[i];
        if (x < (float)s->x0 || x > (float)s->x1 || y < (float)s->y0 || y > (float)s->y1) continue;
        float t = enter(s->thing->solid, s->eye, along(along(s->forward, s->up, ry), s->right, rx));
        if (t > .01f && t < z) z = t, *seen = i;
    }
    return z;
}

/* What stands nearest at each pixel's centre: depth, and its number in key. */
static void meet_solids(struct view *v) {
    for (int y = 0; y < v->side; y++) {
        float z = ground_depth(v, (float)y + .5f);
        for (int x = 0; x < v->side; x++) {
            v->depth[y * v->side + x] = z;
            v->key[y * v->side + x] = z < miss ? ON_GROUND : ON_SKY;
        }
    }
    for (int i = 0; i < v->n; i++) {
        const struct solid *s = &v->solids[i];
        for (int y = s->y0; y < s->y1; y++) {
            vec row = along(s->forward, s->up, ray_y(v, (float)y + .5f));
            for (int x = s->x0; x < s->x1; x++) {
                vec ray = along(row, s->right, ray_x(v, (float)x + .5f));
                float t = enter(s->thing->solid, s->eye, ray);
                if (t <= .01f || t >= v->depth[y * v->side + x]) continue;
                v->depth[y * v->side + x] = t;
                v->key[y * v->side + x] = (uint16_t)i;
            }
        }
    }
}

/* ---- Patterns: a share from 0 (first colour) to 1 (second) ---- */

/* Clouds: two waves that bend each other; parabolas stand in for sines. */
static float wave(float x) {
    float u = to_and_fro(x);
    return u * u * (3 - 2 * u);
}

static inline float pattern_at(int pattern, vec p, float frequency) {
    if (pattern == PLAIN) return 0;
    vec q = add(times(p, frequency), (vec){.37f, .21f, .11f});
    int x = floor_int(q.x), y = floor_int(q.y), z = floor_int(q.z);
    switch (pattern) {
    case STRIPES: return (float)((x + y) & 1);
    case CHECKER: return (float)((x + y + z) & 1);
    case DOTS:
        q = minus(q, (vec){(float)x + .5f, (float)y + .5f, (float)z + .5f});
        return (float)(dot(q, q) < .16f);
    case CLOUDS:
        return .5f * (wave(.4f * q.x + wave(.23f * q.z)) + wave(.37f * q.z + wave(.29f * q.x)));
    default: return 0;
    }
}

/* Whether a ray from p to the light passes a ball around a point. */
static int passes(vec p, vec light, vec middle, float squared_radius) {
    vec to = minus(middle, p);
    float ahead = dot(to, light), away = dot(to, to);
    return away - ahead * ahead < squared_radius && (ahead > 0 || away < squared_radius);
}

/* Whether something stands between p and the light. */
static int in_shadow(const struct view *v, vec p, int from) {
    if (!passes(p, v->scene.light, v->middle, v->reach)) return 0;
    for (int i = 0; i < v->n; i++) {
        const struct solid *s = &v->solids[i];
        if (i == from || !passes(p, v->scene.light, s->thing->centre, s->reach)) continue;
        float t = enter(s->thing->solid, inwards(s, minus(p, s->thing->centre)), s->light);
        if (t > 1e-3f && t < miss) return 1;
    }
    return 0;
}

/* What a ray meets: everything that colours and annotations need. */
struct surface {
    vec point, normal, colour;
    float shine, haze;
    int key; /* the number, face and cell of the pattern; the shadow comes later */
};

static inline struct surface ground_surface(const struct view *v, vec ray, float z) {
    const struct scene *s = &v->scene;
    struct surface at = {.normal = {0, 1, 0}, .key = ON_GROUND};
    at.point = along(v->eye, ray, z);
    vec flat = {at.point.x, 0, at.point.z};
    float share = pattern_at(s->pattern, flat, s->frequency);
    if (s->pattern != CLOUDS && share > 0) at.key |= KEY_CELL;
    /* Where a pixel covers half a cell of the pattern its contrast is gone. */
    float covered = 2 * s->frequency * z * z * v->pixel / v->eye.y;
    float contrast = clamp(1.5f - 1.5f * covered, 0, 1);
    if (contrast == 0) at.key = ON_GROUND;
    at.colour = blend(s->ground, s->second, .5f + (share - .5f) * contrast);
    float beyond = .09f * (z > 6 ? z - 6 : 0);
    at.haze = beyond / (1 + beyond);
    return at;
}

static struct surface thing_surface(const struct view *v, vec ray, float z, int i) {
    const struct solid *s = &v->solids[i];
    const struct thing *t = s->thing;
    struct surface at = {.shine = t->shine};
    at.point = along(v->eye, ray, z);
    vec p = inwards(s, minus(at.point, t->centre));
    int face;
    vec n = solid_normal(t->solid, p, &face);
    n = add(add(times(s->row[0], n.x), times(s->row[1], n.y)), times(s->row[2], n.z));
    at.normal = unit(n);
    at.key = i | face * KEY_FACE;
    at.colour = t->colour;
    if (t->pattern != PLAIN) {
        vec q = {p.x * t->size.x, p.y * t->size.y, p.z * t->size.z};
        float share = pattern_at(t->pattern, q, t->frequency);
        if (share > 0) at.key |= KEY_CELL;
        at.colour = blend(t->colour, t->second, share);
    }
    return at;
}

static inline vec ray_at(const struct view *v, float x, float y) {
    return along(along(v->forward, v->up, ray_y(v, y)), v->right, ray_x(v, x));
}

static vec sky_colour(const struct scene *s, vec ray) {
    if (!s->has_ground) return s->low_sky;
    float rise = ray.y / sqrtf(dot(ray, ray));
    return blend(s->low_sky, s->high_sky, clamp(2 * rise, 0, 1));
}

/* The colour of what a ray meets at depth z, which is thing `seen`, ground or sky. */
static vec shade(const struct view *v, float x, float y, float z, int seen, int *key) {
    const struct scene *s = &v->scene;
    vec ray = ray_at(v, x, y);
    *key = seen;
    if (seen == ON_SKY) return sky_colour(s, ray);
    int ground = seen == ON_GROUND;
    struct surface at = ground ? ground_surface(v, ray, z) : thing_surface(v, ray, z, seen);
    float cosine = dot(at.normal, s->light), highlight = 0;
    if (cosine <= 0 || in_shadow(v, at.point, seen)) cosine = 0;
    if (cosine > 0 && at.shine > 0) {
        vec half = unit(minus(s->light, unit(ray)));
        float h = clamp(dot(at.normal, half), 0, 1), h8 = h * h * h * h * h * h * h * h;
        highlight = at.shine * h8 * h8 * h8 * h8 * h8;
    }
    *key = cosine > 0 ? at.key : at.key | KEY_SHADOW;
    float fill = s->ambient * (.75f + .25f * at.normal.y);
    vec colour = times(at.colour, fill + (1 - s->ambient) * 1.25f * cosine);
    colour = add(colour, (vec){highlight, highlight, highlight});
    return ground ? blend(colour, s->low_sky, at.haze) : colour;
}

static inline uint8_t byte_of(float x) { return (uint8_t)(clamp(x, 0, 1) * 255 + .5f); }

static inline void put_colour(uint8_t *rgb, vec colour) {
    rgb[0] = byte_of(colour.x), rgb[1] = byte_of(colour.y), rgb[2] = byte_of(colour.z);
}

static int is_border(const struct view *v, int x, int y, int mask) {
    const uint16_t *key = v->key + y * v->side + x;
    int own = key[0] & mask, last = v->side - 1;
    return (x > 0 && (key[-1] & mask) != own) || (x < last && (key[1] & mask) != own) ||
           (y > 0 && (key[-v->side] & mask) != own) || (y < last && (key[v->side] & mask) != own);
}

/* The mean of four rays through the middles of a pixel's quarters. */
static vec smooth(const struct view *v, int x, int y) {
    vec sum = {0, 0, 0};
    for (int i = 0; i < 4; i++) {
        float u = (float)x + .25f + .5f * (float)(i & 1);
        float w = (float)y + .25f + .25f * (float)(i & 2);
        float ground = ground_depth(v, w);
        int key, seen = ground < miss ? ON_GROUND : ON_SKY;
        float z = nearest(v, u, w, ground, &seen);
        vec colour = shade(v, u, w, z, seen, &key);
        sum = add(sum, (vec){clamp(colour.x, 0, 1), clamp(colour.y, 0, 1), clamp(colour.z, 0, 1)});
    }
    return times(sum, .25f);
}

/* The picture rgb[side][side][3] of a scene; depth and key stay in the view. */
static void render(struct view *v, const struct scene *scene, uint8_t *rgb) {
    look(v, scene);
    meet_solids(v);
    for (int i = 0; i < v->side * v->side; i++) {
        float x = (float)(i % v->side) + .5f, y = (float)(i / v->side) + .5f;
        int key;
        put_colour(rgb + 3 * i, shade(v, x, y, v->depth[i], v->key[i], &key));
        v->key[i] = (uint16_t)key;
    }
    for (int y = 0; y < v->side; y++)
        for (int x = 0; x < v->side; x++)
            if (is_border(v, x, y, 0xffff))
                put_colour(rgb + 3 * (y * v->side + x), smooth(v, x, y));
}

static int seen_at(const struct view *v, int pixel) { return v->key[pixel] & 255; }

/* =================================================================================================
   6.  Annotations

   Of a view that was rendered. Depth, outlines and classes are written as one byte a pixel with or
   without a palette; styles are palettes, so that a task can be learned in several looks. */

/* Depth is written as (1/z - 1/depth_far) / (1/depth_near - 1/depth_far) times 255, rounded: near
   is 255, the sky and all beyond depth_far 0. */
static const float depth_near = 2.2f, depth_far = 14;

enum { DEPTH_STYLES = 5, CLASS_STYLES = 4, EDGE_STYLES = 2, STOPS = 7 };

/* Colours from far to near; the last is a rainbow, which the model that ships has never seen. */
static const uint8_t depth_stops[DEPTH_STYLES][STOPS][3] = {
    {{0, 0, 0}, {43, 43, 43}, {85, 85, 85}, {128, 128, 128}, {170, 170, 170}, {213, 213, 213},
     {255, 255, 255}},
    {{255, 255, 255}, {213, 213, 213}, {170, 170, 170}, {128, 128, 128}, {85, 85, 85},
     {43, 43, 43}, {0, 0, 0}},
    {{48, 18, 59}, {68, 130, 242}, {38, 217, 204}, {153, 250, 77}, {242, 199, 51}, {230, 77, 20},
     {122, 5, 3}},
    {{0, 0, 4}, {61, 12, 96}, {130, 38, 103}, {190, 55, 82}, {237, 105, 37}, {251, 180, 26},
     {252, 255, 164}},
    {{255, 0, 0}, {255, 204, 0}, {102, 255, 0}, {0, 255, 102}, {0, 204, 255}, {0, 0, 255},
     {204, 0, 255}}};

static const uint8_t class_palettes[CLASS_STYLES][CLASSES][3] = {
    {{0, 0, 0}, {230, 25, 75}, {60, 180, 75}, {0, 130, 200}, {255, 225, 25}, {245, 130, 48},
     {90, 90, 90}},
    {{40, 40, 60}, {255, 255, 0}, {0, 255, 255}, {255, 0, 255}, {0, 255, 0}, {255, 255, 255},
     {110, 70, 40}},
    {{135, 190, 235}, {200, 0, 0}, {0, 90, 200}, {240, 160, 0}, {130, 0, 160}, {255, 120, 190},
     {90, 150, 70}},
    {{255, 255, 255}, {0, 0, 0}, {220, 40, 40}, {40, 80, 220}, {40, 160, 60}, {240, 180, 30},
     {190, 190, 190}}};

static void depth_palette(int style, uint8_t palette[256][3]) {
    for (int i = 0; i < 256; i++) {
        int at = i * (STOPS - 1), stop = at / 255 < STOPS - 1 ? at / 255 : STOPS - 2;
        for (int c = 0; c < 3; c++) {
            int a = depth_stops[style][stop][c], b = depth_stops[style][stop + 1][c];
            palette[i][c] = (uint8_t)((a * 255 + (b - a) * (at - 255 * stop) + 127) / 255);
        }
    }
}

static void draw_depth(const struct view *v, uint8_t *out) {
    float scale = 1 / (1 / depth_near - 1 / depth_far);
    for (int i = 0; i < v->side * v->side; i++)
        out[i] = byte_of((1 / v->depth[i] - 1 / depth_far) * scale);
}

/* Normals as seen by the camera: red points right, green up, blue to the viewer; 0 .. 255 is
   -1 .. 1. The sky has none: grey. */
static void draw_normals(const struct view *v, uint8_t *rgb) {
    for (int i = 0; i < v->side * v->side; i++) {
        int seen = seen_at(v, i);
        vec n = {0, seen == ON_SKY ? 0 : 1, 0};
        vec ray = ray_at(v, (float)(i % v->side) + .5f, (float)(i / v->side) + .5f);
        if (seen < MAX_THINGS) n = thing_surface(v, ray, v->depth[i], seen).normal;
        n = (vec){dot(n, v->right), dot(n, v->up), -dot(n, v->forward)};
        put_colour(rgb + 3 * i, (vec){.5f + .5f * n.x, .5f + .5f * n.y, .5f + .5f * n.z});
    }
}

static int class_at(const struct view *v, int pixel) {
    int seen = seen_at(v, pixel);
    return seen == ON_SKY ? SKY : seen == ON_GROUND ? GROUND : v->things[seen].class;
}

static void draw_classes(const struct view *v, uint8_t *out) {
    for (int i = 0; i < v->side * v->side; i++) out[i] = (uint8_t)class_at(v, i);
}

/* 255 on both sides of every border between two solids or two faces of one. */
static void draw_edges(const struct view *v, uint8_t *out) {
    for (int y = 0; y < v->side; y++)
        for (int x = 0; x < v->side; x++)
            out[y * v->side + x] = is_border(v, x, y, KEY_CELL - 1) ? 255 : 0;
}

/* A drawing in ink: outlines, thin lines where a pattern changes, shadows hatched. */
static void draw_lines(const struct view *v, uint8_t *out) {
    int gap = v->side >= 192 ? 6 : 4;
    for (int y = 0; y < v->side; y++)
        for (int x = 0; x < v->side; x++) {
            int i = y * v->side + x, shadow = v->key[i] & KEY_SHADOW, next = x + 1 < v->side;
            int cell = (next && (v->key[i] ^ v->key[i + 1]) & KEY_CELL) ||
                       (y + 1 < v->side && (v->key[i] ^ v->key[i + v->side]) & KEY_CELL);
            int hatched = shadow && (x + y) % gap == 0;
            int outline = is_border(v, x, y, KEY_CELL - 1);
            out[i] = outline ? 20 : hatched ? 110 : cell ? 170 : 255;
        }
}

/* ---- Boxes and masks ---- */

/* The pixels of one instance: their number and the corners x0 <= x < x1 around them. */
struct region {
    int class, instance, area, x0, y0, x1, y1;
};

static int instance_at(const struct view *v, int pixel) {
    int seen = seen_at(v, pixel);
    return seen < MAX_THINGS ? v->things[seen].instance : -1;
}

static struct region region_of(const struct view *v, int class, int instance) {
    struct region r = {class, instance, 0, v->side, v->side, 0, 0};
    for (int i = 0; i < v->side * v->side; i++) {
        int x = i % v->side, y = i / v->side;
        if (instance_at(v, i) != instance) continue;
        r.area++;
        if (x < r.x0) r.x0 = x;
        if (y < r.y0) r.y0 = y;
        if (x + 1 > r.x1) r.x1 = x + 1;
        if (y + 1 > r.y1) r.y1 = y + 1;
    }
    return r;
}

/* The instances that show a thousandth of the picture at least. */
static int find_regions(const struct view *v, struct region *found) {
    int n = 0, least = v->side * v->side / 1000;
    for (int i = 0; i < v->scene.n; i++) {
        found[n] = region_of(v, v->things[i].class, v->things[i].instance);
        n += found[n].area >= least;
    }
    if (!v->scene.has_figure) return n;
    found[n] = region_of(v, FIGURE, MAX_THINGS);
    return n + (found[n].area >= least);
}

/* A frame around a box, outside it, in its class's colour. */
static void draw_box(uint8_t *rgb, int side, const struct region *r) {
    static const uint8_t colours[CLASSES][3] = {{0, 0, 0},     {255, 0, 0},   {0, 204, 0},
                                                {26, 77, 255}, {255, 255, 0}, {255, 0, 255}};
    int width = side / 85 > 0 ? side / 85 : 1;
    for (int y = r->y0 - width; y < r->y1 + width; y++)
        for (int x = r->x0 - width; x < r->x1 + width; x++) {
            int inside = x >= r->x0 && x < r->x1 && y >= r->y0 && y < r->y1;
            if (!inside && x >= 0 && y >= 0 && x < side && y < side)
                memcpy(rgb + 3 * (y * side + x), colours[r->class], 3);
        }
}

/* ---- Key points ----

   v as COCO has it: 0 not labelled (outside the picture, or a point of the face that looks away), 1
   hidden, 2 visible. A point lies inside its limb: it is visible when the figure is seen there at
   about its depth. */

struct point {
    float x, y;
    int v;
};

static void find_points(const struct view *v, struct point *found) {
    for (int i = 0; i < POINTS; i++) {
        struct point *p = &found[i];
        int face = i == NOSE || i >= R_EYE;
        float z = project(v, v->points[i], &p->x, &p->y), side = (float)v->side;
        if (p->x >= 0 && p->y >= 0 && p->x < side && p->y < side) {
            int pixel = (int)p->y * v->side + (int)p->x;
            float before = z - v->depth[pixel];
            int own = instance_at(v, pixel) == MAX_THINGS;
            p->v = face ? 2 * (before < .06f) : own && before < .25f ? 2 : 1;
        }
        if (p->v == 0) p->x = p->y = 0;
    }
}

/* OpenPose's limbs and its colours, of limbs and points in turn. */
static const int limbs[17][2] = {
    {NECK, R_SHOULDER}, {NECK, L_SHOULDER}, {R_SHOULDER, R_ELBOW}, {R_ELBOW, R_WRIST},
    {L_SHOULDER, L_ELBOW}, {L_ELBOW, L_WRIST}, {NECK, R_HIP}, {R_HIP, R_KNEE}, {R_KNEE, R_ANKLE},
    {NECK, L_HIP}, {L_HIP, L_KNEE}, {L_KNEE, L_ANKLE}, {NECK, NOSE}, {NOSE, R_EYE}, {R_EYE, R_EAR},
    {NOSE, L_EYE}, {L_EYE, L_EAR}};

static const uint8_t point_colours[POINTS][3] = {
    {255, 0, 0}, {255, 85, 0}, {255, 170, 0}, {255, 255, 0}, {170, 255, 0}, {85, 255, 0},
    {0, 255, 0}, {0, 255, 85}, {0, 255, 170}, {0, 255, 255}, {0, 170, 255}, {0, 85, 255},
    {0, 0, 255}, {85, 0, 255}, {170, 0, 255}, {255, 0, 255}, {255, 0, 170}, {255, 0, 85}};

/* Mixes a colour into a pixel. */
static void mix_in(uint8_t *rgb, const uint8_t *colour, float share) {
    share = clamp(share, 0, 1);
    for (int c = 0; c < 3; c++)
        rgb[c] = (uint8_t)((float)rgb[c] * (1 - share) + (float)colour[c] * share + .5f);
}

/* A line with round ends from a to b; a dot where they are one. */
static void draw_stroke(uint8_t *rgb, int side, struct point a, struct point b, float radius,
                        const uint8_t *colour) {
    float dx = b.x - a.x, dy = b.y - a.y, length = dx * dx + dy * dy + 1e-6f, r = radius + 1;
    int x0 = (int)clamp((a.x < b.x ? a.x : b.x) - r, 0, (float)side);
    int x1 = (int)clamp((a.x < b.x ? b.x : a.x) + r + 1, 0, (float)side);
    int y0 = (int)clamp((a.y < b.y ? a.y : b.y) - r, 0, (float)side);
    int y1 = (int)clamp((a.y < b.y ? b.y : a.y) + r + 1, 0, (float)side);
    for (int y = y0; y < y1; y++)
        for (int x = x0; x < x1; x++) {
            float px = (float)x + .5f - a.x, py = (float)y + .5f - a.y;
            float h = clamp((px * dx + py * dy) / length, 0, 1);
            px -= h * dx, py -= h * dy;
            float share = radius + .5f - sqrtf(px * px + py * py);
            if (share > 0) mix_in(rgb + 3 * (y * side + x), colour, share);
        }
}

static void draw_skeleton(uint8_t *rgb, int side, const struct point *p) {
    float radius = (float)side / 80;
    memset(rgb, 0, 3 * (size_t)side * (size_t)side);
    for (int i = 0; i < 17; i++) {
        const struct point *a = &p[limbs[i][0]], *b = &p[limbs[i][1]];
        if (a->v > 0 && b->v > 0) draw_stroke(rgb, side, *a, *b, radius, point_colours[i]);
    }
    for (int i = 0; i < POINTS; i++)
        if (p[i].v > 0)
            draw_stroke(rgb, side, p[i], p[i], (i == NOSE || i >= R_EYE ? .8f : 1.1f) * radius,
                        point_colours[i]);
}

/* =================================================================================================
   7.  Flat pictures

   Shapes on paper by their signed distance (below 0 inside), which also gives the share of a pixel
   that they cover. Coordinates go from -1 to 1, y down. */

enum { CIRCLE, SQUARE, TRIANGLE, CROSS, HEXAGON, FLAT_SHAPES, STAR = FLAT_SHAPES };
enum { FLAT_COLOURS = 8, FLAT_SIZES = 4, FLAT_COUNTS = 9 };

static const char *const flat_names[FLAT_SHAPES] = {"circle", "square", "triangle", "cross",
                                                    "hexagon"};
static const char *const colour_names[FLAT_COLOURS] = {"red",    "green",  "blue", "yellow",
                                                       "orange", "purple", "cyan", "black"};
static const uint8_t flat_colours[FLAT_COLOURS][3] = {
    {230, 25, 75}, {60, 180, 75}, {0, 110, 220}, {255, 215, 25}, {245, 130, 48}, {145, 30, 180},
    {70, 220, 230}, {40, 40, 40}};

static float flat_distance(int shape, float x, float y, float r) {
    float ax = fabsf(x), ay = fabsf(y);
    switch (shape) {
    case CIRCLE: return sqrtf(x * x + y * y) - r;
    case SQUARE: return larger(ax, ay) - .85f * r;
    case TRIANGLE: return larger(.866f * ax - .5f * y, y) - .55f * r;
    case CROSS: {
        float bar = larger(ax - r, ay - .34f * r), post = larger(ay - r, ax - .34f * r);
        return bar < post ? bar : post;
    }
    case HEXAGON: return larger(.866f * ax + .5f * ay, ay) - .88f * r;
    default: { /* a star: the distance from the nearest of ten edges, folded onto one */
        float sector = 2 * pi / 5, angle = atan2f(x, -y);
        angle = fabsf(angle - sector * floorf(angle / sector + .5f));
        float length = sqrtf(x * x + y * y), u = length * cosf(angle), w = length * sinf(angle);
        return (u - r) * .59f + w * .81f; /* the edge from the tip (r, 0) inwards */
    }
    }
}

struct stamp {
    int shape;
    float x, y, radius, turn;
    const uint8_t *colour;
};

static void draw_stamp(uint8_t *rgb, int side, struct stamp s) {
    float scale = .5f * (float)side, reach = 1.25f * s.radius + 1 / scale;
    float cosine = cosf(s.turn), sine = sinf(s.turn);
    int x0 = (int)clamp((s.x - reach + 1) * scale, 0, (float)side);
    int x1 = (int)clamp((s.x + reach + 1) * scale + 1, 0, (float)side);
    int y0 = (int)clamp((s.y - reach + 1) * scale, 0, (float)side);
    int y1 = (int)clamp((s.y + reach + 1) * scale + 1, 0, (float)side);
    for (int y = y0; y < y1; y++)
        for (int x = x0; x < x1; x++) {
            float u = ((float)x + .5f) / scale - 1 - s.x, w = ((float)y + .5f) / scale - 1 - s.y;
            float along_x = cosine * u + sine * w, along_y = cosine * w - sine * u;
            float share = .5f - flat_distance(s.shape, along_x, along_y, s.radius) * scale;
            if (share > 0) mix_in(rgb + 3 * (y * side + x), s.colour, share);
        }
}

static void fill(uint8_t *rgb, int side, const uint8_t *colour) {
    for (int i = 0; i < side * side; i++) memcpy(rgb + 3 * i, colour, 3);
}

/* ---- Panels: 1 to 9 equal shapes ---- */

struct panel {
    int shape, count, size, colour; /* count from 1, the others from 0 */
    int turn;                       /* in steps of 15 degrees */
};

/* A single shape is large and in the middle; more lie like the spots of dice. */
static void draw_panel(uint8_t *rgb, int side, const uint8_t *paper, struct panel p) {
    static const int spots[FLAT_COUNTS + 1] = {0,     0020,  0401,  0421,  0505,
                                               0525,  0555,  0575,  0757,  0777};
    float radius = .11f + .05f * (float)p.size;
    fill(rgb, side, paper);
    for (int i = 0; i < 9; i++) {
        if (!(spots[p.count] >> i & 1)) continue;
        struct stamp s = {.shape = p.shape, .x = .6f * (float)(i % 3 - 1), .colour =
                          flat_colours[p.colour], .y = .6f * (float)(i / 3 - 1)};
        s.radius = p.count == 1 ? 2 * radius : radius;
        s.turn = (float)p.turn * pi / 12;
        draw_stamp(rgb, side, s);
    }
}

/* ---- Progressions: two rows of eight pictures; in each, one property goes on step by step ----

   The description is the panels themselves, and of two equal turns of a shape the smaller: equal
   pictures are equal bytes. */

enum { STEPS = 8, BY_COUNT = 0, BY_SIZE, BY_TURN, BY_COLOUR, RULES };

static void draw_progression(struct chance *c, struct panel row[2][STEPS]) {
    static const int same_turn[FLAT_SHAPES] = {1, 6, 8, 6, 4}; /* in steps of 15 degrees */
    int rule = below(c, RULES), down = below(c, 2), step = 1 + below(c, 3);
    for (int r = 0; r < 2; r++) {
        int shape = rule == BY_TURN ? SQUARE + below(c, FLAT_SHAPES - 1) : below(c, FLAT_SHAPES);
        int colour = below(c, FLAT_COLOURS), start = below(c, 24);
        for (int i = 0; i < STEPS; i++) {
            int at = down ? STEPS - 1 - i : i;
            struct panel p = {shape, 1, 2, colour, 0};
            if (rule == BY_COUNT) p.count = 1 + start % 2 + at, p.size = 1;
            if (rule == BY_SIZE) p.size = at;
            if (rule == BY_TURN) p.turn = (start + at * step) % same_turn[shape];
            if (rule == BY_COLOUR) p.colour = (colour + at * step) % FLAT_COLOURS;
            row[r][i] = p;
        }
    }
}

/* ---- Counting: things fill a grid one after the other, or leave it ---- */

struct counting {
    int shape, colour, columns, by_column, from_end, down, step, start;
};

static void draw_counting(struct chance *c, struct counting *p) {
    p->shape = below(c, FLAT_SHAPES);
    p->colour = below(c, FLAT_COLOURS);
    p->columns = 4 + below(c, 2);
    p->by_column = below(c, 2);
    p->from_end = below(c, 2);
    p->down = below(c, 2);
    p->step = 1 + below(c, 2);
    p->start = below(c, p->columns * p->columns - (STEPS - 1) * p->step);
}

static void draw_count(uint8_t *rgb, int side, const uint8_t *paper, const struct counting *p,
                       int i) {
    int n = p->columns, count = p->start + (p->down ? STEPS - 1 - i : i) * p->step + 1;
    float pitch = 1.8f / (float)n;
    fill(rgb, side, paper);
    for (int k = 0; k < count; k++) {
        int cell = p->from_end ? n * n - 1 - k : k;
        int column = p->by_column ? cell / n : cell % n, row = p->by_column ? cell % n : cell / n;
        struct stamp s = {p->shape, pitch * ((float)column + .5f) - .9f,
                          pitch * ((float)row + .5f) - .9f, .4f * pitch, 0,
                          flat_colours[p->colour]};
        draw_stamp(rgb, side, s);
    }
}

/* ---- Raven's matrices ----

   Nine panels read row by row, as in RAVEN (Zhang et al. 2019). Each of shape, count, size and
   colour follows a rule of its own: the same along a row, one more from panel to panel, or the
   same three values in each row, moved on by one. The first two rows tell the rules apart, so the
   ninth panel is certain. */

enum { PANELS = FLAT_SHAPES * FLAT_COUNTS * FLAT_SIZES * FLAT_COLOURS, CHOICES = 8 };

static const int panel_values[4] = {FLAT_SHAPES, FLAT_COUNTS, FLAT_SIZES, FLAT_COLOURS};

struct matrix {
    int value[9][4]; /* of each panel: shape, count, size, colour, all from 0 */
};

static void draw_rule(struct chance *c, struct matrix *m, int k) {
    int n = panel_values[k], order[FLAT_COUNTS], rule = below(c, k == 0 ? 2 : 3);
    shuffled(c, order, n);
    for (int row = 0; row < 3; row++) {
        int start = below(c, n - 2);
        for (int i = 0; i < 3; i++)
            m->value[3 * row + i][k] =
                rule == 0 ? order[row] : rule == 1 ? order[(row + i) % 3] : start + i;
    }
}

static void draw_matrix(struct chance *c, struct matrix *m) {
    for (int k = 0; k < 4; k++) draw_rule(c, m, k);
}

static int panel_number(const int value[4]) {
    int number = 0;
    for (int k = 0; k < 4; k++) number = number * panel_values[k] + value[k];
    return number;
}

static void panel_of_number(int number, int value[4]) {
    for (int k = 3; k >= 0; k--, number /= panel_values[k + 1])
        value[k] = number % panel_values[k];
}

static void panel_name(char *out, size_t room, const int value[4]) {
    snprintf(out, room, "%s-%s-%d-size%d.png", colour_names[value[3]], flat_names[value[0]],
             value[1] + 1, value[2] + 1);
}

/* Eight different panels, the right one at the returned place. The wrong ones differ from it in one
   or two properties. */
static int draw_choices(struct chance *c, const struct matrix *m, int choices[CHOICES]) {
    int right = panel_number(m->value[8]), place = below(c, CHOICES), n = 0;
    while (n < CHOICES) {
        int value[4], different = n == place;
        panel_of_number(right, value);
        for (int change = below(c, 2); n != place && change < 2; change++) {
            int k = below(c, 4);
            value[k] = below(c, panel_values[k]);
        }
        choices[n] = panel_number(value);
        different |= choices[n] != right;
        for (int i = 0; i < n; i++) different &= choices[i] != choices[n];
        n += different;
    }
    return place;
}

/* =================================================================================================
   8.  Boards

   A walker goes from the start to the goal by the fewest moves. Only boards with a single shortest
   way are used, so that the first picture decides all that follow. Held out is decided by the
   board without the start: no picture of one side is one of the other. */

enum { MAX_BOARD = 11, MOVES = 15, FREE = 0, WALL, HOLE };

struct board {
    int n, goal;
    int cell[MAX_BOARD * MAX_BOARD]; /* [n][n]: FREE, WALL or HOLE */
};

static int step_from(const struct board *b, int at, int way) { /* -1: off the board, or barred */
    int x = at % b->n + (way == 1) - (way == 3), y = at / b->n + (way == 2) - (way == 0);
    if (x < 0 || y < 0 || x >= b->n || y >= b->n || b->cell[y * b->n + x] != FREE) return -1;
    return y * b->n + x;
}

/* The moves to the goal from each cell (-1: there is no way), by breadth-first search, and the
   number of shortest ways (2 stands for more). */
static void measure(const struct board *b, int *distance, int *ways) {
    int queue[MAX_BOARD * MAX_BOARD], head = 0, tail = 0;
    for (int i = 0; i < b->n * b->n; i++) distance[i] = -1, ways[i] = 0;
    distance[b->goal] = 0, ways[b->goal] = 1;
    for (queue[tail++] = b->goal; head < tail; head++)
        for (int way = 0; way < 4; way++) {
            int at = queue[head], to = step_from(b, at, way);
            if (to < 0) continue;
            if (distance[to] < 0) distance[to] = distance[at] + 1, queue[tail++] = to;
            if (distance[to] == distance[at] + 1) ways[to] = clamp_int(ways[to] + ways[at], 0, 2);
        }
}

/* Passages between the cells of odd coordinates, by a walk that goes back where it is stuck; then
   some walls fall, so that there are several ways. */
static void carve(struct chance *c, struct board *b) {
    int stack[MAX_BOARD * MAX_BOARD], n = b->n, depth = 0;
    for (int i = 0; i < n * n; i++) b->cell[i] = WALL;
    stack[depth++] = n + 1;
    b->cell[n + 1] = FREE;
    while (depth > 0) {
        int at = stack[depth - 1], order[4], moved_on = 0;
        shuffled(c, order, 4);
        for (int i = 0; i < 4 && !moved_on; i++) {
            int dx = (order[i] == 1) - (order[i] == 3), dy = (order[i] == 2) - (order[i] == 0);
            int x = at % n + 2 * dx, y = at / n + 2 * dy;
            if (x < 0 || y < 0 || x >= n || y >= n || b->cell[y * n + x] == FREE) continue;
            b->cell[at + dy * n + dx] = b->cell[y * n + x] = FREE;
            stack[depth++] = y * n + x;
            moved_on = 1;
        }
        if (!moved_on) depth--;
    }
    for (int fall = below(c, 4); fall > 0; fall--) {
        int x = 1 + below(c, n - 2), y = 1 + below(c, n - 2);
        if ((x + y) % 2 == 1) b->cell[y * n + x] = FREE;
    }
}

static void freeze(struct chance *c, struct board *b) {
    for (int i = 0; i < b->n * b->n; i++) b->cell[i] = below(c, 100) < 32 ? HOLE : FREE;
}

/* A board and a start from which one way is the shortest, of least to MOVES moves. */
static int draw_board(struct chance *c, struct board *b, int n, int is_maze, int least) {
    int distance[MAX_BOARD * MAX_BOARD], ways[MAX_BOARD * MAX_BOARD];
    for (;;) {
        memset(b, 0, sizeof *b);
        b->n = n;
        if (is_maze) carve(c, b);
        else freeze(c, b);
        b->goal = below(c, n * n);
        int start = below(c, n * n);
        if (b->cell[b->goal] != FREE || b->cell[start] != FREE) continue;
        measure(b, distance, ways);
        if (distance[start] >= least && distance[start] <= MOVES && ways[start] == 1) return start;
    }
}

/* The cells of the shortest way, the first being the start; how many. */
static int shortest_way(const struct board *b, int start, int way[MOVES + 1]) {
    int distance[MAX_BOARD * MAX_BOARD], ways[MAX_BOARD * MAX_BOARD], n = 0;
    measure(b, distance, ways);
    for (int at = start; n <= MOVES; n++) {
        way[n] = at;
        if (at == b->goal) return n + 1;
        for (int i = 0; i < 4; i++) {
            int to = step_from(b, way[n], i);
            if (to >= 0 && distance[to] == distance[way[n]] - 1) at = to;
        }
    }
    return n;
}

struct theme {
    uint8_t floor[3], line[3], wall[3], walker[3], goal[3];
};

static void draw_theme(struct chance *c, struct theme *t, int is_maze) {
    float hue = between(c, 0, 1), other = hue + between(c, .3f, .7f);
    if (is_maze) {
        put_colour(t->floor, hue_of(c, hue, hue, 0, .2f, .85f, 1));
        put_colour(t->wall, hue_of(c, hue, hue, .2f, .7f, .2f, .5f));
        memcpy(t->line, t->floor, 3);
    } else { /* ice and water */
        put_colour(t->floor, hue_of(c, .5f, .6f, .08f, .25f, 1, 1));
        put_colour(t->line, hsv(.56f, .3f, .85f));
        put_colour(t->wall, hue_of(c, .6f, .6f, .6f, .9f, .3f, .55f));
    }
    put_colour(t->walker, hsv(other - (float)floor_int(other), .85f, .9f));
    put_colour(t->goal, hsv(.13f, .9f, 1));
}

/* The middle of a cell, -1 to 1, and half its side. */
static float cell_middle(int i, int n) { return (2 * (float)i + 1) / (float)n - 1; }

static void draw_cell(uint8_t *rgb, int side, const struct board *b, const struct theme *t, int i) {
    int n = b->n, x = i % n, y = i / n, gap = memcmp(t->line, t->floor, 3) != 0; /* between cells */
    const uint8_t *colour = b->cell[i] == WALL ? t->wall : t->floor;
    for (int v = y * side / n + gap; v < (y + 1) * side / n; v++)
        for (int u = x * side / n + gap; u < (x + 1) * side / n; u++)
            memcpy(rgb + 3 * (v * side + u), colour, 3);
    struct stamp hole = {CIRCLE, cell_middle(x, n), cell_middle(y, n), .72f / (float)n, 0, t->wall};
    if (b->cell[i] == HOLE) draw_stamp(rgb, side, hole);
}

/* One state: the board, a mark at the start, a star at the goal, the walker. */
static void draw_state(uint8_t *rgb, int side, const struct board *b, const struct theme *t,
                       int start, int at) {
    static const uint8_t white[3] = {255, 255, 255}, dark[3] = {30, 30, 40};
    float half = 1 / (float)b->n, eye = .3f * half;
    fill(rgb, side, t->line);
    for (int i = 0; i < b->n * b->n; i++) draw_cell(rgb, side, b, t, i);
    float x = cell_middle(start % b->n, b->n), y = cell_middle(start / b->n, b->n);
    draw_stamp(rgb, side, (struct stamp){CIRCLE, x, y, .82f * half, 0, t->walker});
    draw_stamp(rgb, side, (struct stamp){CIRCLE, x, y, .66f * half, 0, t->floor});
    x = cell_middle(b->goal % b->n, b->n), y = cell_middle(b->goal / b->n, b->n);
    draw_stamp(rgb, side, (struct stamp){STAR, x, y, .98f * half, 0, dark});
    draw_stamp(rgb, side, (struct stamp){STAR, x, y, .8f * half, 0, t->goal});
    x = cell_middle(at % b->n, b->n), y = cell_middle(at / b->n, b->n);
    draw_stamp(rgb, side, (struct stamp){CIRCLE, x, y, .55f * half, 0, t->walker});
    for (int i = -1; i <= 1; i += 2) {
        float u = x + .5f * eye * (float)i * 1.3f, w = y - .15f * half;
        draw_stamp(rgb, side, (struct stamp){CIRCLE, u, w, .5f * eye, 0, white});
        draw_stamp(rgb, side, (struct stamp){CIRCLE, u, w, .25f * eye, 0, dark});
    }
}

/* =================================================================================================
   9.  PNG

   A fast level of compression: each row is stored as its difference from the pixel on the left or
   from the row above, whichever is smaller; repeated bytes become matches of distance 1; then
   Huffman's codes for the one block (RFC 1951). Two passes over the bytes in all. */

enum { LITERALS = 286, LENGTH_CODES = 19, SHORTEST = 4, LONGEST = 258, SIGNATURE = 8 };

struct packer {
    uint8_t *rows;      /* filtered: [side][1 + 3 side] */
    uint16_t *tokens;   /* a byte, or 256 + the length of a match */
    uint8_t *out;       /* the file */
    size_t n;           /* its bytes so far */
    uint64_t hold;      /* bits that are no whole bytes yet */
    int held;
    uint32_t crc[256];
    uint8_t symbol_of_length[LONGEST + 1]; /* less 257 */
};

/* The shortest match of each length symbol, and how many bits say how much longer one is. */
static const uint16_t match_base[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,
                                        15, 17, 19, 23, 27, 31, 35, 43, 51,  59,
                                        67, 83, 99, 115, 131, 163, 195, 227, 258};
static const uint8_t match_bits[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                       2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};

static int packer_open(struct packer *p, int side) {
    size_t raw = (size_t)side * (size_t)(3 * side + 1);
    *p = (struct packer){.rows = malloc(raw), .tokens = malloc(raw * sizeof *p->tokens)};
    p->out = malloc(2 * raw + 4096); /* a code has 15 bits at most */
    for (uint32_t i = 0; i < 256; i++) {
        p->crc[i] = i;
        for (int k = 0; k < 8; k++) p->crc[i] = p->crc[i] >> 1 ^ (p->crc[i] & 1 ? 0xedb88320u : 0);
    }
    for (int i = 0; i < 29; i++)
        for (int length = match_base[i]; length <= LONGEST; length++)
            p->symbol_of_length[length] = (uint8_t)i;
    return p->rows != NULL && p->tokens != NULL && p->out != NULL;
}

static void packer_close(struct packer *p) {
    free(p->rows);
    free(p->tokens);
    free(p->out);
}

static void put_bits(struct packer *p, uint32_t value, int count) {
    p->hold |= (uint64_t)value << p->held;
    p->held += count;
    for (; p->held >= 32; p->held -= 32, p->hold >>= 32)
        for (int i = 0; i < 32; i += 8) p->out[p->n++] = (uint8_t)(p->hold >> i);
}

static void put_last_bits(struct packer *p) {
    for (; p->held > 0; p->held -= 8, p->hold >>= 8) p->out[p->n++] = (uint8_t)p->hold;
    p->held = 0;
    p->hold = 0;
}

static void put_number(struct packer *p, uint32_t x) {
    for (int i = 24; i >= 0; i -= 8) p->out[p->n++] = (uint8_t)(x >> i);
}

static void put_bytes(struct packer *p, const void *data, size_t n) {
    memcpy(p->out + p->n, data, n);
    p->n += n;
}

/* ---- Huffman codes ---- */

struct leaf {
    uint32_t count;
    int symbol;
};

static int by_count(const void *a, const void *b) {
    const struct leaf *x = a, *y = b;
    if (x->count != y->count) return x->count < y->count ? -1 : 1;
    return x->symbol - y->symbol;
}

/* The depth of each of m leaves, sorted by count, in Huffman's tree (1952): the two lightest nodes
   are joined until one is left. Leaves, and joined nodes, come in ascending order by themselves.
   Returns the greatest depth. */
static int tree_depths(const struct leaf *leaves, int m, uint8_t *depth) {
    uint32_t weight[2 * LITERALS];
    int parent[2 * LITERALS], leaf = 0, node = m, greatest = 0;
    for (int i = 0; i < m; i++) weight[i] = leaves[i].count;
    for (int made = m; made < 2 * m - 1; made++) {
        weight[made] = 0;
        for (int k = 0; k < 2; k++) {
            int take = leaf < m && (node >= made || weight[leaf] <= weight[node]) ? leaf++ : node++;
            weight[made] += weight[take];
            parent[take] = made;
        }
    }
    uint8_t below_root[2 * LITERALS];
    below_root[2 * m - 2] = 0;
    for (int i = 2 * m - 3; i >= 0; i--) {
        below_root[i] = (uint8_t)(below_root[parent[i]] + 1);
        if (below_root[i] > greatest) greatest = below_root[i];
    }
    memcpy(depth, below_root, (size_t)m);
    return greatest;
}

/* The lengths of the symbols' codes, at most `limit` bits: where the tree is deeper the counts are
   halved, which makes them more alike. */
static void code_lengths(const uint32_t *count, int n, int limit, uint8_t *length) {
    struct leaf leaves[LITERALS];
    uint8_t depth[LITERALS];
    int m = 0;
    for (int i = 0; i < n; i++) {
        length[i] = 0;
        if (count[i] > 0) leaves[m++] = (struct leaf){count[i], i};
    }
    if (m == 1) length[leaves[0].symbol] = 1;
    if (m < 2) return;
    qsort(leaves, (size_t)m, sizeof *leaves, by_count);
    while (tree_depths(leaves, m, depth) > limit)
        for (int i = 0; i < m; i++) leaves[i].count = leaves[i].count / 2 + 1;
    for (int i = 0; i < m; i++) length[leaves[i].symbol] = depth[i];
}

/* The canonical codes of these lengths, their first bit lowest, as deflate writes them. */
static void codes_of(const uint8_t *length, int n, uint16_t *code) {
    unsigned next = 0;
    for (int bits = 1; bits <= 15; bits++, next <<= 1)
        for (int i = 0; i < n; i++) {
            if (length[i] != bits) continue;
            unsigned turned = 0;
            for (int k = 0; k < bits; k++) turned |= (next >> k & 1) << (bits - 1 - k);
            code[i] = (uint16_t)turned;
            next++;
        }
}

/* ---- deflate ---- */

/* The tokens of the bytes and how often each symbol occurs; returns the number of tokens. */
static size_t tokenize(struct packer *p, size_t n, uint32_t *count) {
    const uint8_t *in = p->rows;
    size_t tokens = 0;
    for (size_t i = 0; i < n;) {
        size_t run = 0, most = n - i < LONGEST ? n - i : LONGEST;
        if (i > 0)
            while (run < most && in[i + run] == in[i - 1]) run++;
        if (run < SHORTEST) {
            count[in[i]]++;
            p->tokens[tokens++] = in[i++];
        } else {
            count[257 + p->symbol_of_length[run]]++;
            p->tokens[tokens++] = (uint16_t)(256 + run);
            i += run;
        }
    }
    count[256]++;
    return tokens;
}

/* The block's header: the codes' lengths, which have codes themselves. Literals, then one distance,
   whose code is one bit. */
static void put_codes(struct packer *p, const uint8_t *length) {
    static const uint8_t order[LENGTH_CODES] = {16, 17, 18, 0, 8,  7, 9,  6, 10, 5,
                                                11, 4,  12, 3, 13, 2, 14, 1, 15};
    uint32_t count[LENGTH_CODES] = {0};
    uint8_t bits[LENGTH_CODES];
    uint16_t code[LENGTH_CODES];
    for (int i = 0; i < LITERALS; i++) count[length[i]]++;
    count[1]++;
    code_lengths(count, LENGTH_CODES, 7, bits);
    codes_of(bits, LENGTH_CODES, code);
    put_bits(p, 1 | 2 << 1, 3); /* the last block, of codes of its own */
    put_bits(p, LITERALS - 257, 5);
    put_bits(p, 0, 5);
    put_bits(p, LENGTH_CODES - 4, 4);
    for (int i = 0; i < LENGTH_CODES; i++) put_bits(p, bits[order[i]], 3);
    for (int i = 0; i < LITERALS; i++) put_bits(p, code[length[i]], bits[length[i]]);
    put_bits(p, code[1], bits[1]);
}

static void deflate(struct packer *p, size_t n) {
    uint32_t count[LITERALS] = {0};
    uint8_t length[LITERALS];
    uint16_t code[LITERALS];
    size_t tokens = tokenize(p, n, count);
    code_lengths(count, LITERALS, 15, length);
    codes_of(length, LITERALS, code);
    put_codes(p, length);
    for (size_t i = 0; i < tokens; i++) {
        int token = p->tokens[i], run = token - 256;
        if (token < 256) {
            put_bits(p, code[token], length[token]);
        } else {
            int s = p->symbol_of_length[run];
            put_bits(p, code[257 + s], length[257 + s]);
            put_bits(p, (uint32_t)(run - match_base[s]), match_bits[s] + 1); /* and the distance */
        }
    }
    put_bits(p, code[256], length[256]);
    put_last_bits(p);
}

static uint32_t adler32(const uint8_t *data, size_t n) {
    uint32_t a = 1, b = 0;
    for (size_t i = 0; i < n;) {
        size_t end = n - i < 5552 ? n : i + 5552; /* no sum overflows before */
        for (; i < end; i++) a += data[i], b += a;
        a %= 65521, b %= 65521;
    }
    return b << 16 | a;
}

/* ---- The file ---- */

/* A row of n bytes as differences: from the left (filter 1) or from above (2). */
static void filter_row(const uint8_t *row, const uint8_t *above, int n, int pixel, uint8_t *out) {
    int left = 0, up = 0;
    for (int i = 0; i < n; i++) {
        left += abs((int8_t)(row[i] - (i < pixel ? 0 : row[i - pixel])));
        up += abs((int8_t)(row[i] - above[i]));
    }
    *out++ = left <= up ? 1 : 2;
    for (int i = 0; i < pixel; i++) out[i] = left <= up ? row[i] : (uint8_t)(row[i] - above[i]);
    const uint8_t *from = left <= up ? row : above + pixel;
    for (int i = pixel; i < n; i++) out[i] = (uint8_t)(row[i] - from[i - pixel]);
}

static size_t begin_chunk(struct packer *p, const char *name) {
    put_number(p, 0);
    put_bytes(p, name, 4);
    return p->n;
}

static void end_chunk(struct packer *p, size_t start) {
    uint32_t crc = ~0u, size = (uint32_t)(p->n - start);
    for (size_t i = start - 4; i < p->n; i++) crc = crc >> 8 ^ p->crc[(crc ^ p->out[i]) & 255];
    put_number(p, ~crc);
    for (int i = 0; i < 4; i++) p->out[start - 8 + (size_t)i] = (uint8_t)(size >> (24 - 8 * i));
}

/* Pixels of one byte (grey, or numbers into a palette of so many colours) or three (RGB). */
struct pixels {
    const uint8_t *data;
    int side, channels, colours;
    const uint8_t *palette; /* [colours][3] */
};

/* The file's bytes, p->out[p->n]. */
static void pack_png(struct packer *p, struct pixels x) {
    static const uint8_t signature[SIGNATURE] = {137, 'P', 'N', 'G', 13, 10, 26, 10};
    static const uint8_t zlib_header[2] = {0x78, 0x01}, zeros[3 * 2048] = {0};
    int row = x.side * x.channels, type = x.channels == 3 ? 2 : x.colours > 0 ? 3 : 0;
    uint8_t form[5] = {8, (uint8_t)type, 0, 0, 0};
    p->n = 0;
    put_bytes(p, signature, SIGNATURE);
    size_t start = begin_chunk(p, "IHDR");
    put_number(p, (uint32_t)x.side);
    put_number(p, (uint32_t)x.side);
    put_bytes(p, form, 5);
    end_chunk(p, start);
    if (x.colours > 0) {
        start = begin_chunk(p, "PLTE");
        put_bytes(p, x.palette, 3 * (size_t)x.colours);
        end_chunk(p, start);
    }
    for (int y = 0; y < x.side; y++) {
        const uint8_t *from = x.data + (size_t)y * (size_t)row;
        uint8_t *to = p->rows + (size_t)y * (size_t)(row + 1);
        filter_row(from, y > 0 ? from - row : zeros, row, x.channels, to);
    }
    size_t n = (size_t)x.side * (size_t)(row + 1);
    start = begin_chunk(p, "IDAT");
    put_bytes(p, zlib_header, 2);
    deflate(p, n);
    put_number(p, adler32(p->rows, n));
    end_chunk(p, start);
    end_chunk(p, begin_chunk(p, "IEND"));
}

/* =================================================================================================
   10.  Kinds

   An item is drawn, then made: its pictures are written into the kind's folders, and what there is
   to say about it is added to the kind's lists (COCO's JSON, lines of text). */

enum { MAX_LISTS = 2, MAX_FOLDERS = 7, VIEWS = 24, BATCH = 512, MAX_PATH_BYTES = 4096 };
enum { DEPTH, NORMALS, SEGMENTATION, EDGES, LINES, ANNOTATIONS };

/* All that chance decides about an item. What is held out is decided by `what`. */
struct item {
    struct {
        struct scene scene;
        struct motion motion;
        struct panel row[2][STEPS];
        struct counting counting;
        struct matrix matrix;
        struct board board;
    } what;
    int number, start; /* start: on a board */
    struct theme theme;
    uint8_t paper[3];
};

/* Text that grows; without memory it is marked and stays as it is. */
struct text {
    char *bytes;
    size_t n, room;
    int failed;
};

struct worker;

struct kind {
    const char *name, *unit, *help;
    const char *folders[MAX_FOLDERS], *lists[MAX_LISTS];
    int annotations[2]; /* first and behind the last of those it writes */
    int styles, has_frames;
    int before;         /* items that are always made: Raven's panels */
    void (*draw)(struct chance *c, struct item *item);
    int (*make)(struct worker *w, int number, struct text *lists);
};

struct run {
    const struct kind *kind;
    int kind_number, count, side, style, frames, threads, held_out, quiet;
    uint64_t seed;
    const char *out;              /* the folder in the end; until then it is called `folder` */
    char folder[MAX_PATH_BYTES];
    int first, end;               /* the batch of items that is being made */
    atomic_int next, failed;
    atomic_llong pictures;
    pthread_mutex_t mutex;        /* of the error, which is the first one's */
    char error[MAX_PATH_BYTES + 200];
    struct text texts[BATCH][MAX_LISTS];
    int has_text[MAX_LISTS];      /* something stands in the list already */
};

struct worker {
    struct run *run;
    struct view view;
    struct packer packer;
    uint8_t *rgb, *other;         /* [side][side][3] */
};

__attribute__((format(printf, 2, 3)))
static int fail(struct run *run, const char *format, ...) {
    va_list args;
    va_start(args, format);
    pthread_mutex_lock(&run->mutex);
    if (!atomic_load(&run->failed)) vsnprintf(run->error, sizeof run->error, format, args);
    atomic_store(&run->failed, 1);
    pthread_mutex_unlock(&run->mutex);
    va_end(args);
    return 0;
}

__attribute__((format(printf, 2, 3)))
static void say(struct text *t, const char *format, ...) {
    va_list args;
    for (int again = 0; again < 2 && !t->failed; again++) {
        va_start(args, format);
        int n = vsnprintf(t->bytes + t->n, t->room - t->n, format, args);
        va_end(args);
        if (n >= 0 && (size_t)n < t->room - t->n) {
            t->n += (size_t)n;
            return;
        }
        size_t room = 2 * t->room + (size_t)(n < 0 ? 0 : n) + 1;
        char *larger_one = realloc(t->bytes, room);
        t->failed = larger_one == NULL;
        if (larger_one != NULL) t->bytes = larger_one, t->room = room;
    }
}

static int make_folder(struct run *run, const char *path) {
#ifdef _WIN32
    int bad = _mkdir(path);
#else
    int bad = mkdir(path, 0777);
#endif
    if (bad && errno != EEXIST) return fail(run, "%s: cannot make it: %s", path, strerror(errno));
    return 1;
}

/* Writes a picture into one of the kind's folders. */
static int write_picture(struct worker *w, const char *folder, const char *name, struct pixels x) {
    char path[MAX_PATH_BYTES + 100];
    snprintf(path, sizeof path, "%s/%s/%s", w->run->folder, folder, name);
    pack_png(&w->packer, x);
    FILE *f = fopen(path, "wb");
    if (f == NULL) return fail(w->run, "%s: cannot write it: %s", path, strerror(errno));
    size_t written = fwrite(w->packer.out, 1, w->packer.n, f);
    int closed = fclose(f) == 0;
    if (written != w->packer.n || !closed)
        return fail(w->run, "%s: cannot write it: %s", path, strerror(errno));
    atomic_fetch_add(&w->run->pictures, 1);
    return 1;
}

static int write_rgb(struct worker *w, const char *folder, const char *name, const uint8_t *rgb) {
    return write_picture(w, folder, name, (struct pixels){.data = rgb, .side = w->run->side,
                                                          .channels = 3});
}

/* A folder `number` in one of the kind's folders, for frames. */
static int make_numbered(struct worker *w, const char *folder, int number) {
    char path[MAX_PATH_BYTES + 100];
    snprintf(path, sizeof path, "%s/%s/%06d", w->run->folder, folder, number);
    return make_folder(w->run, path);
}

static void draw_item(const struct worker *w, int number, struct item *item) {
    const struct run *run = w->run;
    struct chance c = chance_of(run->seed, run->kind_number, number);
    do {
        memset(item, 0, sizeof *item);
        item->number = number;
        run->kind->draw(&c, item);
    } while (is_held_out(&item->what, sizeof item->what) != run->held_out);
}

/* ---- Draws ---- */

static void draw_any(struct chance *c, struct item *item) {
    if (below(c, 4) == 0) draw_object(c, &item->what.scene);
    else draw_scene(c, &item->what.scene);
}

static void draw_still(struct chance *c, struct item *item) { draw_scene(c, &item->what.scene); }

static void draw_of_class(struct chance *c, struct item *item) {
    struct scene *s = &item->what.scene;
    int class = item->number % (SOLIDS + 1);
    if (class == SOLIDS) {
        draw_figure_scene(c, s);
        s->n = 0;
    } else {
        draw_surroundings(c, s);
        draw_things(c, s, 1, 3, class);
    }
}

static void draw_figure(struct chance *c, struct item *item) {
    draw_figure_scene(c, &item->what.scene);
}

static void draw_video(struct chance *c, struct item *item) {
    draw_moving(c, &item->what.scene, &item->what.motion);
}

static void draw_turntable(struct chance *c, struct item *item) {
    draw_object(c, &item->what.scene);
}

static void draw_paper(struct chance *c, uint8_t *paper) {
    put_colour(paper, hue_of(c, 0, 1, 0, .08f, .88f, 1));
}

static void draw_puzzle(struct chance *c, struct item *item) {
    draw_progression(c, item->what.row);
    draw_paper(c, item->paper);
}

static void draw_counts(struct chance *c, struct item *item) {
    draw_counting(c, &item->what.counting);
    draw_paper(c, item->paper);
}

static void draw_raven(struct chance *c, struct item *item) { draw_matrix(c, &item->what.matrix); }

static void draw_maze(struct chance *c, struct item *item) {
    item->start = draw_board(c, &item->what.board, 9 + 2 * below(c, 2), 1, 5);
    draw_theme(c, &item->theme, 1);
}

static void draw_lake(struct chance *c, struct item *item) {
    item->start = draw_board(c, &item->what.board, 4 + below(c, 4), 0, 3);
    draw_theme(c, &item->theme, 0);
}

/* ---- Scenes ---- */

static const char *const annotation_folders[ANNOTATIONS] = {"depth", "normals", "segmentation",
                                                            "edges", "lines"};

static int write_annotation(struct worker *w, int which, const char *name) {
    const struct view *v = &w->view;
    int style = w->run->style;
    uint8_t palette[256][3];
    struct pixels x = {.data = w->other, .side = v->side, .channels = 1};
    if (which == DEPTH) {
        draw_depth(v, w->other);
        depth_palette(style, palette);
        if (style > 0) x.palette = palette[0], x.colours = 256;
    } else if (which == NORMALS) {
        draw_normals(v, w->other);
        x.channels = 3;
    } else if (which == SEGMENTATION) {
        draw_classes(v, w->other);
        x.palette = class_palettes[style][0], x.colours = CLASSES;
    } else if (which == EDGES) {
        draw_edges(v, w->other);
        if (style % EDGE_STYLES == 1)
            for (int i = 0; i < v->side * v->side; i++) w->other[i] ^= 255;
    } else {
        draw_lines(v, w->other);
    }
    return write_picture(w, annotation_folders[which], name, x);
}

static void say_vec(struct text *t, const char *name, vec v) {
    say(t, "\"%s\": [%.9g, %.9g, %.9g], ", name, (double)v.x, (double)v.y, (double)v.z);
}

/* Where the camera stood and what depths mean, a line a picture. */
static void say_camera(struct text *t, const struct view *v, const char *name) {
    say(t, "{\"image\": \"%s\", ", name);
    say_vec(t, "eye", v->eye);
    say_vec(t, "forward", v->forward);
    say_vec(t, "right", v->right);
    say_vec(t, "up", v->up);
    say(t, "\"field\": %.9g, \"near\": %.9g, \"far\": %.9g}\n",
        (double)v->scene.camera.field, (double)depth_near, (double)depth_far);
}

/* A picture of a scene and its annotations, all of one name. */
static int make_frame(struct worker *w, const struct scene *s, const char *name,
                      struct text *cameras) {
    const struct kind *kind = w->run->kind;
    render(&w->view, s, w->rgb);
    int good = write_rgb(w, kind->folders[0], name, w->rgb);
    for (int a = kind->annotations[0]; good && a < kind->annotations[1]; a++)
        good = write_annotation(w, a, name);
    if (kind->lists[0] != NULL) say_camera(cameras, &w->view, name);
    return good;
}

static int make_still(struct worker *w, int number, struct text *lists) {
    struct item item;
    char name[40];
    draw_item(w, number, &item);
    snprintf(name, sizeof name, "%06d.png", number);
    return make_frame(w, &item.what.scene, name, &lists[0]);
}

static int make_of_class(struct worker *w, int number, struct text *lists) {
    struct item item;
    char name[40];
    (void)lists;
    draw_item(w, number, &item);
    snprintf(name, sizeof name, "%06d.png", number);
    render(&w->view, &item.what.scene, w->rgb);
    return write_rgb(w, w->run->kind->folders[number % (SOLIDS + 1)], name, w->rgb);
}

/* A folder of frames, and one of the same number for each annotation. */
static int make_video(struct worker *w, int number, struct text *lists) {
    struct item item;
    int good = 1;
    draw_item(w, number, &item);
    for (int i = 0; i < MAX_FOLDERS && w->run->kind->folders[i] != NULL; i++)
        good = good && make_numbered(w, w->run->kind->folders[i], number);
    for (int frame = 0; good && frame < w->run->frames; frame++) {
        struct scene s = moved(&item.what.scene, &item.what.motion, frame);
        char name[40];
        snprintf(name, sizeof name, "%06d/%03d.png", number, frame);
        good = make_frame(w, &s, name, &lists[0]);
    }
    return good;
}

/* 24 views, the camera 15 degrees further round each time. */
static int make_views(struct worker *w, int number, struct text *lists) {
    struct item item;
    int good = make_numbered(w, "views", number);
    draw_item(w, number, &item);
    for (int i = 0; good && i < VIEWS; i++) {
        struct scene s = item.what.scene;
        char name[40];
        s.camera.azimuth += (float)i * 2 * pi / VIEWS;
        snprintf(name, sizeof name, "%06d/%03d.png", number, i);
        good = make_frame(w, &s, name, &lists[0]);
    }
    return good;
}

/* ---- COCO ---- */

/* The mask of an instance as COCO's run lengths: column by column, 0s first. */
static void say_mask(struct text *t, const struct view *v, int instance) {
    int run = 0, inside = 0;
    const char *comma = "";
    say(t, "{\"size\": [%d, %d], \"counts\": [", v->side, v->side);
    for (int x = 0; x < v->side; x++)
        for (int y = 0; y < v->side; y++, run++) {
            int in = instance_at(v, y * v->side + x) == instance;
            if (in == inside) continue;
            say(t, "%s%d", comma, run);
            comma = ", ";
            run = 0;
            inside = in;
        }
    say(t, "%s%d]}", comma, run);
}

/* An annotation without its closing brace. Its id follows from the picture's. */
static void say_instance(struct text *t, const struct view *v, const struct region *r, int picture,
                         int k, int category) {
    say(t, ",\n{\"id\": %d, \"image_id\": %d, \"category_id\": %d, \"iscrowd\": 0, ",
        picture * MAX_THINGS + k + 1, picture, category);
    say(t, "\"bbox\": [%d, %d, %d, %d], \"area\": %d, \"segmentation\": ", r->x0, r->y0,
        r->x1 - r->x0, r->y1 - r->y0, r->area);
    say_mask(t, v, r->instance);
}

static int make_boxes(struct worker *w, int number, struct text *lists) {
    struct region found[MAX_THINGS];
    struct item item;
    char name[40];
    draw_item(w, number, &item);
    snprintf(name, sizeof name, "%06d.png", number);
    render(&w->view, &item.what.scene, w->rgb);
    int n = find_regions(&w->view, found), good = write_rgb(w, "images", name, w->rgb);
    for (int i = 0; i < n; i++) {
        say_instance(&lists[0], &w->view, &found[i], number, i, found[i].class);
        say(&lists[0], "}");
        draw_box(w->rgb, w->run->side, &found[i]);
    }
    return good && write_rgb(w, "boxes", name, w->rgb);
}

/* COCO's 17 points in its order; OpenPose's neck is the middle of the shoulders. */
static const int coco_points[POINTS - 1] = {
    NOSE,    L_EYE,   R_EYE, L_EAR, R_EAR,  L_SHOULDER, R_SHOULDER, L_ELBOW, R_ELBOW,
    L_WRIST, R_WRIST, L_HIP, R_HIP, L_KNEE, R_KNEE,     L_ANKLE,    R_ANKLE};

static int make_keypoints(struct worker *w, int number, struct text *lists) {
    struct point points[POINTS] = {{0, 0, 0}};
    struct item item;
    struct text *t = &lists[0];
    char name[40];
    int labelled = 0;
    draw_item(w, number, &item);
    snprintf(name, sizeof name, "%06d.png", number);
    render(&w->view, &item.what.scene, w->rgb);
    struct region r = region_of(&w->view, FIGURE, MAX_THINGS);
    find_points(&w->view, points);
    for (int i = 0; i < POINTS - 1; i++) labelled += points[coco_points[i]].v > 0;
    say_instance(t, &w->view, &r, number, 0, 1);
    say(t, ", \"num_keypoints\": %d, \"keypoints\": [", labelled);
    for (int i = 0; i < POINTS - 1; i++) {
        struct point p = points[coco_points[i]];
        say(t, "%s%.2f, %.2f, %d", i > 0 ? ", " : "", (double)p.x, (double)p.y, p.v);
    }
    say(t, "]}");
    draw_skeleton(w->other, w->run->side, points);
    return write_rgb(w, "images", name, w->rgb) && write_rgb(w, "poses", name, w->other);
}

/* ---- Flat pictures and boards: each line of the layout is a sentence; * marks an answer ---- */

/* Writes picture i of an item and its name in the layout. */
static int put_state(struct worker *w, int number, int i, int answer, struct text *layout) {
    char name[40];
    snprintf(name, sizeof name, "%06d-%02d.png", number, i);
    say(layout, "%s%simages/%s", i > 0 ? " " : "", answer ? "*" : "", name);
    return write_rgb(w, "images", name, w->rgb);
}

static int make_puzzle(struct worker *w, int number, struct text *lists) {
    struct item item;
    int good = 1;
    draw_item(w, number, &item);
    for (int i = 0; good && i < 2 * STEPS; i++) {
        draw_panel(w->rgb, w->run->side, item.paper, item.what.row[i / STEPS][i % STEPS]);
        good = put_state(w, number, i, i == 2 * STEPS - 1, &lists[0]);
    }
    say(&lists[0], "\n");
    return good;
}

static int make_counting(struct worker *w, int number, struct text *lists) {
    struct item item;
    int good = 1;
    draw_item(w, number, &item);
    for (int i = 0; good && i < STEPS; i++) {
        draw_count(w->rgb, w->run->side, item.paper, &item.what.counting, i);
        good = put_state(w, number, i, i == STEPS - 1, &lists[0]);
    }
    say(&lists[0], "\n");
    return good;
}

/* The board as text, a word a row, and the moves: for programs that judge answers. */
static void say_board(struct text *t, const struct board *b, int start, const int *way, int n) {
    for (int i = 0; i < b->n * b->n; i++) {
        char free = i == start ? 'S' : i == b->goal ? 'G' : '.';
        say(t, "%s%c", i > 0 && i % b->n == 0 ? " " : "",
            b->cell[i] == WALL ? '#' : b->cell[i] == HOLE ? 'O' : free);
    }
    say(t, "\t");
    for (int i = 1; i < n; i++) {
        int step = way[i] - way[i - 1];
        say(t, "%c", step == 1 ? 'R' : step == -1 ? 'L' : step > 0 ? 'D' : 'U');
    }
    say(t, "\n");
}

static int make_board(struct worker *w, int number, struct text *lists) {
    struct item item;
    int good = 1, way[MOVES + 1];
    draw_item(w, number, &item);
    int n = shortest_way(&item.what.board, item.start, way);
    for (int i = 0; good && i < n; i++) {
        draw_state(w->rgb, w->run->side, &item.what.board, &item.theme, item.start, way[i]);
        good = put_state(w, number, i, i > 0, &lists[0]);
    }
    say(&lists[0], "\n");
    say_board(&lists[1], &item.what.board, item.start, way, n);
    return good;
}

static int make_panel(struct worker *w, int number) {
    static const uint8_t white[3] = {255, 255, 255};
    int value[4];
    char name[60];
    panel_of_number(number, value);
    panel_name(name, sizeof name, value);
    draw_panel(w->rgb, w->run->side, white,
               (struct panel){value[0], value[1] + 1, value[2], value[3], 0});
    return write_rgb(w, "panels", name, w->rgb);
}

/* The table of panels comes first; then a line of the layout a matrix, and the same matrix with
   eight choices as `lvm rank` reads it. */
static int make_raven(struct worker *w, int number, struct text *lists) {
    if (number < PANELS) return make_panel(w, number);
    struct item item;
    char name[60];
    int choices[CHOICES], value[4];
    draw_item(w, number, &item);
    struct chance c = chance_of(w->run->seed + 1, w->run->kind_number, number);
    int answer = draw_choices(&c, &item.what.matrix, choices);
    say(&lists[1], "{\"input\": [");
    for (int i = 0; i < 9; i++) {
        panel_name(name, sizeof name, item.what.matrix.value[i]);
        say(&lists[0], "%s%spanels/%s", i > 0 ? " " : "", i == 8 ? "*" : "", name);
        if (i < 8) say(&lists[1], "%s\"panels/%s\"", i > 0 ? ", " : "", name);
    }
    say(&lists[0], "\n");
    say(&lists[1], "], \"choices\": [");
    for (int i = 0; i < CHOICES; i++) {
        panel_of_number(choices[i], value);
        panel_name(name, sizeof name, value);
        say(&lists[1], "%s\"panels/%s\"", i > 0 ? ", " : "", name);
    }
    say(&lists[1], "], \"answer\": %d}\n", answer);
    return 1;
}

static const struct kind kinds[] = {
    {.name = "single", .unit = "picture", .help = "images/: scenes, figures, objects",
     .folders = {"images"}, .draw = draw_any, .make = make_still},
    {.name = "category", .unit = "picture", .help = "ball/ box/ cylinder/ cone/ figure/ in turn",
     .folders = {"ball", "box", "cylinder", "cone", "figure"}, .draw = draw_of_class,
     .make = make_of_class},
    {.name = "video", .unit = "video", .help = "videos/: a folder of frames each",
     .folders = {"videos"}, .has_frames = 1, .draw = draw_video, .make = make_video},
    {.name = "views", .unit = "object", .help = "views/: a folder of 24 views each; cameras.jsonl",
     .folders = {"views"}, .lists = {"cameras.jsonl"}, .draw = draw_turntable, .make = make_views},
    {.name = "depth", .unit = "scene", .help = "images/ depth/; cameras.jsonl",
     .folders = {"images", "depth"}, .lists = {"cameras.jsonl"},
     .annotations = {DEPTH, DEPTH + 1}, .styles = DEPTH_STYLES, .draw = draw_still,
     .make = make_still},
    {.name = "normals", .unit = "scene", .help = "images/ normals/; cameras.jsonl",
     .folders = {"images", "normals"}, .lists = {"cameras.jsonl"},
     .annotations = {NORMALS, NORMALS + 1}, .draw = draw_still, .make = make_still},
    {.name = "segmentation", .unit = "scene", .help = "images/ segmentation/: classes by palette",
     .folders = {"images", "segmentation"}, .annotations = {SEGMENTATION, SEGMENTATION + 1},
     .styles = CLASS_STYLES, .draw = draw_still, .make = make_still},
    {.name = "edges", .unit = "scene", .help = "images/ edges/: borders of things and faces",
     .folders = {"images", "edges"}, .annotations = {EDGES, EDGES + 1}, .styles = EDGE_STYLES,
     .draw = draw_still, .make = make_still},
    {.name = "lines", .unit = "scene", .help = "images/ lines/: drawn in ink",
     .folders = {"images", "lines"}, .annotations = {LINES, LINES + 1}, .draw = draw_still,
     .make = make_still},
    {.name = "tuples", .unit = "scene", .help = "images/ and all five of these; cameras.jsonl",
     .folders = {"images", "depth", "normals", "segmentation", "edges", "lines"},
     .lists = {"cameras.jsonl"}, .annotations = {0, ANNOTATIONS}, .styles = CLASS_STYLES,
     .draw = draw_still, .make = make_still},
    {.name = "annotated", .unit = "video", .help = "the same of videos, a folder of frames each",
     .folders = {"images", "depth", "normals", "segmentation", "edges", "lines"},
     .lists = {"cameras.jsonl"}, .annotations = {0, ANNOTATIONS}, .styles = CLASS_STYLES,
     .has_frames = 1, .draw = draw_video, .make = make_video},
    {.name = "boxes", .unit = "scene", .help = "images/ instances.json (COCO); boxes/: drawn",
     .folders = {"images", "boxes"}, .lists = {"instances.json"}, .draw = draw_still,
     .make = make_boxes},
    {.name = "keypoints", .unit = "figure", .help = "images/ keypoints.json (COCO); poses/: drawn",
     .folders = {"images", "poses"}, .lists = {"keypoints.json"}, .draw = draw_figure,
     .make = make_keypoints},
    {.name = "puzzle", .unit = "puzzle", .help = "images/ layout.txt: two progressions of eight",
     .folders = {"images"}, .lists = {"layout.txt"}, .draw = draw_puzzle, .make = make_puzzle},
    {.name = "counting", .unit = "puzzle", .help = "images/ layout.txt: one or two more, or fewer",
     .folders = {"images"}, .lists = {"layout.txt"}, .draw = draw_counts, .make = make_counting},
    {.name = "raven", .unit = "matrix", .help = "panels/ (1,440) layout.txt choices.jsonl",
     .folders = {"panels"}, .lists = {"layout.txt", "choices.jsonl"}, .before = PANELS,
     .draw = draw_raven, .make = make_raven},
    {.name = "maze", .unit = "maze", .help = "images/ layout.txt: a walk to the goal; boards.txt",
     .folders = {"images"}, .lists = {"layout.txt", "boards.txt"}, .draw = draw_maze,
     .make = make_board},
    {.name = "lake", .unit = "lake", .help = "the same between holes in ice",
     .folders = {"images"}, .lists = {"layout.txt", "boards.txt"}, .draw = draw_lake,
     .make = make_board},
};

enum { KINDS = sizeof kinds / sizeof *kinds };

/* =================================================================================================
   11.  The program

   Items are made in batches by all threads; after each batch its texts go to the lists in order.
   Everything is written into OUT.part, which becomes OUT when all is there: what has its name is
   whole. */

static int worker_open(struct worker *w, struct run *run) {
    size_t pixels = (size_t)run->side * (size_t)run->side;
    *w = (struct worker){.run = run, .rgb = malloc(3 * pixels), .other = malloc(3 * pixels)};
    w->view.side = run->side;
    w->view.depth = malloc(pixels * sizeof *w->view.depth);
    w->view.key = malloc(pixels * sizeof *w->view.key);
    int good = packer_open(&w->packer, run->side) && w->rgb != NULL && w->other != NULL;
    if (good && w->view.depth != NULL && w->view.key != NULL) return 1;
    return fail(run, "out of memory");
}

static void worker_close(struct worker *w) {
    packer_close(&w->packer);
    free(w->rgb);
    free(w->other);
    free(w->view.depth);
    free(w->view.key);
}

/* Makes items of the batch until none is left. */
static void *work(void *arg) {
    struct worker *w = arg;
    struct run *run = w->run;
    for (;;) {
        int i = atomic_fetch_add(&run->next, 1);
        if (i >= run->end || atomic_load(&run->failed)) return NULL;
        struct text *lists = run->texts[i - run->first];
        for (int k = 0; k < MAX_LISTS; k++) lists[k].n = 0;
        if (!run->kind->make(w, i, lists)) return NULL;
        if (lists[0].failed || lists[1].failed) fail(run, "out of memory");
    }
}

static int make_batch(struct run *run, struct worker *workers) {
    pthread_t threads[256];
    int started = 1;
    atomic_store(&run->next, run->first);
    for (; started < run->threads; started++)
        if (pthread_create(&threads[started], NULL, work, &workers[started]) != 0) break;
    work(&workers[0]);
    for (int i = 1; i < started; i++) pthread_join(threads[i], NULL);
    return !atomic_load(&run->failed);
}

/* ---- Lists ---- */

static int is_json(const char *list) { return strcmp(strrchr(list, '.'), ".json") == 0; }

/* COCO's JSON up to the annotations: what the pictures are called is known beforehand. */
static void begin_json(FILE *f, const struct run *run) {
    static const char *const names[POINTS - 1] = {
        "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder",
        "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip",
        "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle"};
    fprintf(f, "{\"images\": [");
    for (int i = 0; i < run->count; i++)
        fprintf(f, "%s\n{\"id\": %d, \"file_name\": \"%06d.png\", \"width\": %d, \"height\": %d}",
                i > 0 ? "," : "", i, i, run->side, run->side);
    fprintf(f, "],\n\"categories\": [");
    if (run->kind->make == make_keypoints) {
        fprintf(f, "{\"id\": 1, \"name\": \"person\", \"keypoints\": [");
        for (int i = 0; i < POINTS - 1; i++) fprintf(f, "%s\"%s\"", i > 0 ? ", " : "", names[i]);
        fprintf(f, "]}");
    } else {
        for (int i = 1; i <= FIGURE; i++)
            fprintf(f, "%s{\"id\": %d, \"name\": \"%s\"}", i > 1 ? ", " : "", i, class_names[i]);
    }
    fprintf(f, "],\n\"annotations\": [");
}

static FILE *open_list(struct run *run, int k) {
    char path[MAX_PATH_BYTES + 100];
    snprintf(path, sizeof path, "%s/%s", run->folder, run->kind->lists[k]);
    FILE *f = fopen(path, "wb");
    if (f == NULL) fail(run, "%s: cannot write it: %s", path, strerror(errno));
    if (f != NULL && is_json(path)) begin_json(f, run);
    return f;
}

/* The batch's texts in order. In JSON each annotation begins with a comma, the first one's but. */
static void append_list(struct run *run, int k, FILE *f) {
    for (int i = 0; i < run->end - run->first; i++) {
        const struct text *t = &run->texts[i][k];
        size_t skip = !run->has_text[k] && is_json(run->kind->lists[k]);
        if (t->n == 0) continue;
        fwrite(t->bytes + skip, 1, t->n - skip, f);
        run->has_text[k] = 1;
    }
}

static int close_list(struct run *run, int k, FILE *f) {
    if (f == NULL) return 0;
    if (is_json(run->kind->lists[k])) fprintf(f, "]}\n");
    int bad = ferror(f);
    if (fclose(f) != 0 || bad)
        return fail(run, "%s/%s: cannot write it: %s", run->folder, run->kind->lists[k],
                    strerror(errno));
    return 1;
}

/* ---- The run ---- */

static int exists(const char *path) {
    struct stat info;
    return stat(path, &info) == 0;
}

/* OUT.part and the kind's folders in it; folders above OUT are made as well. */
static int make_folders(struct run *run) {
    char path[MAX_PATH_BYTES + 100];
    if (exists(run->out)) return fail(run, "%s: exists; name another folder", run->out);
    if (exists(run->folder))
        return fail(run, "%s: left by a run that was stopped, or another one is writing it: "
                         "remove it, or name another folder", run->folder);
    for (char *at = run->folder + 1; *at != 0; at++) {
        if (*at != '/') continue;
        *at = 0;
        int good = make_folder(run, run->folder);
        *at = '/';
        if (!good) return 0;
    }
    if (!make_folder(run, run->folder)) return 0;
    for (int i = 0; i < MAX_FOLDERS && run->kind->folders[i] != NULL; i++) {
        snprintf(path, sizeof path, "%s/%s", run->folder, run->kind->folders[i]);
        if (!make_folder(run, path)) return 0;
    }
    return 1;
}

static void show_progress(const struct run *run, int total) {
    if (run->quiet || !isatty(2)) return;
    fprintf(stderr, "\r%d of %d%s", run->end, total, run->end == total ? "\r\033[K" : "");
    fflush(stderr);
}

static int make_items(struct run *run, struct worker *workers) {
    FILE *lists[MAX_LISTS] = {NULL};
    int total = run->kind->before + run->count, good = 1;
    for (int k = 0; k < MAX_LISTS && run->kind->lists[k] != NULL; k++)
        good = good && (lists[k] = open_list(run, k)) != NULL;
    for (run->first = 0; good && run->first < total; run->first = run->end) {
        run->end = run->first + BATCH < total ? run->first + BATCH : total;
        good = make_batch(run, workers);
        for (int k = 0; good && k < MAX_LISTS && lists[k] != NULL; k++)
            append_list(run, k, lists[k]);
        show_progress(run, total);
    }
    for (int k = 0; k < MAX_LISTS && run->kind->lists[k] != NULL; k++)
        good = close_list(run, k, lists[k]) && good;
    return good;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int make_world(struct run *run) {
    struct worker *workers = calloc((size_t)run->threads, sizeof *workers);
    int good = workers != NULL ? make_folders(run) : fail(run, "out of memory"), open = 0;
    double start = seconds();
    while (good && open < run->threads) good = worker_open(&workers[open++], run);
    good = good && make_items(run, workers);
    for (int i = 0; i < open; i++) worker_close(&workers[i]);
    free(workers);
    for (int i = 0; i < BATCH; i++)
        for (int k = 0; k < MAX_LISTS; k++) free(run->texts[i][k].bytes);
    if (good && rename(run->folder, run->out) != 0)
        good = fail(run, "%s: cannot rename it to %s: %s", run->folder, run->out, strerror(errno));
    if (!good) return fprintf(stderr, "scenes: %s\n", run->error), 1;
    double time = seconds() - start;
    long long pictures = atomic_load(&run->pictures);
    printf("%s\n", run->out);
    if (!run->quiet)
        fprintf(stderr, "%d of kind %s, %lld pictures of %d x %d in %.1f s: %.0f a second\n",
                run->count, run->kind->name, pictures, run->side, run->side, time,
                (double)pictures / time);
    return 0;
}

/* ---- Options ---- */

static void print_help(void) {
    printf("Renders a small world to learn from: pictures and exact annotations.\n\n"
           "    scenes OUT --kind KIND [options]\n\n"
           "OUT is a new folder. Kinds, what is counted, and what is in OUT:\n\n");
    for (int i = 0; i < KINDS; i++)
        printf("    %-13s %-8s %s\n", kinds[i].name, kinds[i].unit, kinds[i].help);
    printf("\nIn a layout.txt a line is a sentence of pictures; * marks those to predict.\n\n"
           "    --count N     how many (100)\n"
           "    --seed N      the same seed, the same bytes (1)\n"
           "    --held-out    from the world that is never drawn without this option\n"
           "    --size N      pixels of a side (256)\n"
           "    --style N     colours of depth (0 to 4), segmentation (0 to 3), edges (0 or 1)\n"
           "    --frames N    of a video (16)\n"
           "    -j N          threads (as many as there are processors)\n"
           "    -q            no summary\n\n"
           "Exit status: 0 done, 1 the work failed, 2 wrong usage.\n");
}

__attribute__((format(printf, 1, 2)))
static int usage(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "scenes: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "; see scenes --help\n");
    va_end(args);
    return 2;
}

/* A whole number from lo to hi. */
static int parse_number(const char *option, const char *text, long long lo, long long hi,
                        long long *out) {
    char *end;
    errno = 0;
    if (text == NULL) return usage("%s needs a number", option);
    *out = strtoll(text, &end, 10);
    if (end == text || *end != 0 || errno != 0 || *out < lo || *out > hi)
        return usage("%s %s: not a whole number from %lld to %lld", option, text, lo, hi);
    return 0;
}

static int parse_kind(struct run *run, const char *name) {
    if (name == NULL) return usage("--kind needs a name");
    for (int i = 0; i < KINDS; i++)
        if (strcmp(kinds[i].name, name) == 0) run->kind = &kinds[i], run->kind_number = i;
    return run->kind != NULL ? 0 : usage("--kind %s: there is no such kind", name);
}

static int parse_option(struct run *run, const char *option, const char *value, int *taken) {
    static const struct {
        const char *name;
        long long lo, hi;
    } numbers[] = {{"--count", 1, 1000000}, {"--seed", 0, INT64_MAX}, {"--size", 32, 2048},
                   {"--style", 0, 4},       {"--frames", 1, 1000},    {"-j", 1, 256}};
    int *targets[] = {&run->count, NULL, &run->side, &run->style, &run->frames, &run->threads};
    *taken = 1;
    if (strcmp(option, "--kind") == 0) return parse_kind(run, value);
    for (int i = 0; i < 6; i++) {
        long long n = 0;
        if (strcmp(option, numbers[i].name) != 0) continue;
        if (parse_number(option, value, numbers[i].lo, numbers[i].hi, &n)) return 2;
        if (targets[i] != NULL) *targets[i] = (int)n;
        else run->seed = (uint64_t)n;
        return 0;
    }
    *taken = 0;
    if (strcmp(option, "--held-out") == 0) return run->held_out = 1, 0;
    if (strcmp(option, "-q") == 0) return run->quiet = 1, 0;
    return usage("there is no option %s", option);
}

static int parse(struct run *run, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        int taken = 0;
        if (argv[i][0] != '-') {
            if (run->out != NULL) return usage("%s: one folder is enough", argv[i]);
            run->out = argv[i];
            continue;
        }
        if (parse_option(run, argv[i], i + 1 < argc ? argv[i + 1] : NULL, &taken)) return 2;
        i += taken;
    }
    if (run->out == NULL || run->out[0] == 0) return usage("no folder to write to");
    if (run->kind == NULL) return usage("no --kind");
    if (run->style > 0 && run->style >= run->kind->styles)
        return usage("--style %d: %s has no such style", run->style, run->kind->name);
    size_t n = strlen(run->out);
    if (n > MAX_PATH_BYTES - 100) return usage("the folder's name is too long");
    while (n > 1 && run->out[n - 1] == '/') n--;
    snprintf(run->folder, sizeof run->folder, "%.*s.part", (int)n, run->out);
    return 0;
}

static int processors(void) {
#ifdef _SC_NPROCESSORS_ONLN
    return clamp_int((int)sysconf(_SC_NPROCESSORS_ONLN), 1, 256);
#else
    return 1;
#endif
}

int main(int argc, char **argv) {
    static struct run run = {.count = 100, .side = 256, .frames = 16, .seed = 1,
                             .mutex = PTHREAD_MUTEX_INITIALIZER};
    run.threads = processors();
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) return print_help(), 0;
    int code = parse(&run, argc, argv);
    return code != 0 ? code : make_world(&run);
}
