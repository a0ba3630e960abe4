// A LARS step for all layers of a model: `sums`, `coefficients` and `apply`, one launch each.
//
// Kernels visit memory and do not know what LARS is. The update is core.difference; the coefficients are a rule's tape, see
// lars_array/tape.py. What must be said here once more names its place in core.py, and tests hold the two together.
//
// Before this text stands what `cuda_source.py` writes: the numbers THREADS, ROWS and SLOTS, the enums Field, Input,
// Operation and Policy, and the structures Array, Row, Group, Piece and Model, whose twins are NumPy dtypes there. No
// header is included; compiled with --fmad=false, so that each operation is rounded as NumPy's are.
//
// Sums are added in an order that depends on sizes alone. No number is added by an atomic: they only collect verdicts.


// ------------------------------------------------------------------------------------------------------ element types

struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

template <class T> struct Computed { typedef float type; };
template <> struct Computed<double> { typedef double type; };

union Bits { float number; unsigned bits; };

#ifdef __CUDACC__
__device__ inline float float16_to_float(unsigned short bits) {
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
    return number;
}

__device__ inline unsigned short float_to_float16(float number) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
}
#endif

__device__ inline double wide(double x) { return x; }
__device__ inline float wide(float x) { return x; }
__device__ inline float wide(float16 x) { return float16_to_float(x.bits); }
__device__ inline float wide(bfloat16 x) {
    Bits bits;
    bits.bits = (unsigned)x.bits << 16;
    return bits.number;
}

__device__ inline void store(double& place, double x) { place = x; }
__device__ inline void store(float& place, float x) { place = x; }
__device__ inline void store(float16& place, float x) { place.bits = float_to_float16(x); }
__device__ inline void store(bfloat16& place, float x) {  // to nearest, ties to even; sm_70 has no instruction for it
    Bits bits;
    bits.number = x;
    unsigned rounded = bits.bits + 0x7fffu + (bits.bits >> 16 & 1u);
    place.bits = (unsigned short)(x == x ? rounded >> 16 : bits.bits >> 16 | 0x40u);
}

// ------------------------------------------------------------------------------------------------------------- memory

const int WIDTH = 4;  // elements that a thread takes at once

template <class T> struct alignas(WIDTH * sizeof(T) < 16 ? WIDTH * sizeof(T) : 16) Pack { T at[WIDTH]; };

template <class T> __device__ inline bool is_aligned(const T* x) { return (u64)x % alignof(Pack<T>) == 0; }

// An array that starts at an odd place is read element by element, by the same thread: the sums are the same.
template <class T> __device__ inline Pack<T> load(const T* x, bool aligned) {
    if (aligned) return *reinterpret_cast<const Pack<T>*>(x);
    Pack<T> pack;
    for (int i = 0; i < WIDTH; ++i) pack.at[i] = x[i];
    return pack;
}

template <class T> __device__ inline void save(T* x, const Pack<T>& pack, bool aligned) {
    if (aligned) *reinterpret_cast<Pack<T>*>(x) = pack;
    else for (int i = 0; i < WIDTH; ++i) x[i] = pack.at[i];
}

// The part of an array that a block visits, and who has it.
struct Part {
    const Array& array;
    const Row& row;
    u64 p, out, g;  // in place `out` is p
    i64 begin, end, whole;  // `whole` is where the last full pack ends

    __device__ Part(const Model& m, int number)
        : array(m.arrays[m.pieces[number].array]), row(m.rows[array.row]) {
        int index = m.pieces[number].array;
        p = m.params[index];
        out = m.out == nullptr ? p : m.out[index];
        g = m.grads[index];
        begin = m.pieces[number].index * array.piece;
        end = array.size - begin < array.piece ? array.size : begin + array.piece;
        whole = end - (end - begin) % WIDTH;
    }
};

// ------------------------------------------------------------------------------------ what the rules are not asked for

__device__ inline const double* hyper_of(const Model& m, const Row& row) { return m.hyper + (i64)row.group * FIELDS; }

// core.gradient_factor
__device__ inline double gradient_factor(const double* hyper, const double* norm) {
    double gamma = hyper[MAXIMIZE] != 0 ? -hyper[RESCALE_GRAD] : hyper[RESCALE_GRAD];
    if (norm == nullptr) return gamma;
    bool clipped = *norm > hyper[MAX_GRAD_NORM];
    return gamma * (clipped ? hyper[MAX_GRAD_NORM] / *norm : 1.0);
}

// core._operand and blocks.update_weights: what g, p and v are multiplied by in the third sum.
struct Weights { double gamma, w, h; };

__device__ inline Weights operand(const Model& m, int index, const double* norm) {
    const Row& row = m.rows[index];
    const double* hyper = hyper_of(m, row);
    Weights weights = {gradient_factor(hyper, norm), 0.0, 0.0};
    int norm_of = m.groups[row.group].norm_of;
    if (norm_of != GRADIENT) weights.w = hyper[WEIGHT_DECAY];
    if (norm_of != UPDATE) return weights;
    double momentum = hyper[MOMENTUM];
    double undamped = m.first[index] ? 1.0 : 1.0 - hyper[DAMPENING];
    bool direct = hyper[NESTEROV] != 0 || momentum == 0;
    double a = direct ? 1.0 + momentum * undamped : undamped;
    weights.gamma *= a;
    weights.w *= a;
    weights.h = direct ? momentum * momentum : momentum;
    return weights;
}

// --------------------------------------------------------------------------------------------------------------- sums

struct Sums { double p, g, third; };

// Add up what the threads of a block have, in a fixed order. The first thread gets the total.
__device__ inline Sums total(Sums mine) {
    __shared__ Sums all[THREADS];
    all[threadIdx.x] = mine;
    for (int step = THREADS / 2; step > 0; step /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < step) {
            all[threadIdx.x].p += all[threadIdx.x + step].p;
            all[threadIdx.x].g += all[threadIdx.x + step].g;
            all[threadIdx.x].third += all[threadIdx.x + step].third;
        }
    }
    return all[threadIdx.x];  // of what others have added up, no more than the total is read
}

template <bool THIRD>
__device__ inline void add(Sums& sums, double p, double g, double v, const Weights& weights) {
    sums.p = fma(p, p, sums.p);
    sums.g = fma(g, g, sums.g);
    if (THIRD) {
        double d = weights.gamma * g + weights.w * p + weights.h * v;
        sums.third = fma(d, d, sums.third);
    }
}

template <class P, class G, bool THIRD>
__device__ inline Sums measure(const Part& part, const P* p, const G* g, const typename Computed<P>::type* v,
                               const Weights& weights) {
    Sums sums = {0, 0, 0};
    bool aligned = is_aligned(p) && is_aligned(g) && (v == nullptr || is_aligned(v));
#pragma unroll 4
    for (i64 k = part.begin + WIDTH * (i64)threadIdx.x; k < part.whole; k += WIDTH * THREADS) {
        Pack<P> ps = load(p + k, aligned);
        Pack<G> gs = load(g + k, aligned);
        Pack<typename Computed<P>::type> vs = {};
        if (THIRD && v != nullptr) vs = load(v + k, aligned);
        for (int i = 0; i < WIDTH; ++i) add<THIRD>(sums, wide(ps.at[i]), wide(gs.at[i]), vs.at[i], weights);
    }
    i64 k = part.whole + threadIdx.x;
    if (k < part.end) add<THIRD>(sums, wide(p[k]), wide(g[k]), THIRD && v != nullptr ? v[k] : 0.0, weights);
    return sums;
}

template <class P, class G> __device__ inline Sums measure(const Model& m, const Part& part, const P* p) {
    typedef typename Computed<P>::type V;
    const G* g = reinterpret_cast<const G*>(part.g);
    if (m.weights == nullptr && m.third == 0) return measure<P, G, false>(part, p, g, nullptr, Weights());
    int row = part.array.row;
    Weights weights;
    if (m.weights == nullptr) weights = operand(m, row, m.third_is_clipped ? m.norm : nullptr);
    else weights = Weights{m.weights[3 * row], m.weights[3 * row + 1], m.weights[3 * row + 2]};
    const V* v = weights.h == 0 ? nullptr : reinterpret_cast<const V*>(part.array.v);
    return measure<P, G, true>(part, p, g, v, weights);
}

// First stage, core.sums: of each piece from `first` on, one a block.
template <class P, class G> __device__ inline void sums(const Model& m, int first) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {  // nobody has a verdict yet; `apply` of the step before is done
        *m.bad = 0;
        *m.refusing = m.row_count;
    }
    if (first + (int)blockIdx.x >= m.piece_count) return;  // a model of empty arrays
    typedef typename Computed<P>::type T;
    Part part(m, first + (int)blockIdx.x);
    Sums mine;
    if (part.array.master != 0) mine = measure<T, G>(m, part, reinterpret_cast<const T*>(part.array.master));
    else mine = measure<P, G>(m, part, reinterpret_cast<const P*>(part.p));
    Sums all = total(mine);
    if (threadIdx.x == 0) m.partial[first + blockIdx.x] = all;
}

// The norm of all gradients together, in core.gradient_factor: one block.
extern "C" __global__ void __launch_bounds__(THREADS) gradient_norm(Model m) {
    Sums mine = {0, 0, 0};
    for (int k = threadIdx.x; k < m.piece_count; k += THREADS) {
        double scale = hyper_of(m, m.rows[m.arrays[m.pieces[k].array].row])[RESCALE_GRAD];
        mine.g += scale * scale * m.partial[k].g;
    }
    Sums all = total(mine);
    if (threadIdx.x == 0) *m.norm = sqrt(all.g);
}

// ------------------------------------------------------------------------------------------------------- coefficients

// Play a tape: lars_array/tape.py says what it is. Each thread has a column of registers.
__device__ inline void play(const Group& group, const int* operations, double (*registers)[ROWS], int column, int place) {
    for (int k = group.first_operation; k < group.last_operation; ++k, ++place) {
        const int* operation = operations + 4 * (i64)k;
        double a = registers[operation[1]][column], b = registers[operation[2]][column], result;
        switch (operation[0]) {
            case ADD: result = a + b; break;
            case SUBTRACT: result = a - b; break;
            case MULTIPLY: result = a * b; break;
            case DIVIDE: result = a / b; break;
            case LESS: result = a < b ? 1.0 : 0.0; break;
            case LESS_EQUAL: result = a <= b ? 1.0 : 0.0; break;
            case EQUAL: result = a == b ? 1.0 : 0.0; break;
            case WHERE: result = a != 0 ? b : registers[operation[3]][column]; break;
            case SQRT: result = sqrt(a); break;
            default: result = fabs(a); break;
        }
        registers[place][column] = result;
    }
}

__device__ inline bool is_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

// core.coefficients for one layer, and nonfinite.finite of what comes out.
__device__ inline void decide(const Model& m, int index, const Sums& s, double (*registers)[ROWS], int column) {
    const Row& row = m.rows[index];
    const Group& group = m.groups[row.group];
    const double* hyper = hyper_of(m, row);
    double gamma = gradient_factor(hyper, m.clips ? m.norm : nullptr);
    m.S[index] = s;
    m.gamma[index] = gamma;
    registers[P_SQUARES][column] = s.p;
    registers[G_SQUARES][column] = s.g;
    registers[THIRD_SUM][column] = s.third;
    registers[GAMMA][column] = gamma;
    for (int i = 0; i < FIELDS; ++i) registers[HYPER + i][column] = hyper[i];
    registers[FIRST][column] = m.first[index] ? 1.0 : 0.0;
    registers[PREVIOUS_LR][column] = m.previous_lr[index];
    int place = INPUTS;
    for (int k = group.first_constant; k < group.last_constant; ++k) registers[place++][column] = m.constants[k];
    play(group, m.operations, registers, column, place);
    bool ok = is_finite(s.p) && is_finite(s.g) && is_finite(s.third) && s.g <= row.most;
    for (int i = 0; i < 6; ++i) {
        double c = registers[group.outputs[i]][column];
        m.C[6 * (i64)index + i] = c;
        ok = ok && fabs(c) <= row.limit;
    }
    if (!ok && group.policy != PROPAGATE) atomicMax(m.bad, 1);
    if (!ok && group.policy == RAISE) atomicMin(m.refusing, index);
}

// Second stage: each block has ROWS layers.
extern "C" __global__ void __launch_bounds__(THREADS) coefficients(Model m) {
    const int LANES = THREADS / ROWS;  // threads that add up the pieces of a layer
    __shared__ Sums part[ROWS][LANES];
    __shared__ double registers[SLOTS][ROWS];
    int mine = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    Sums s = {0, 0, 0};
    int first = (int)blockIdx.x * ROWS;
    if (first + mine < m.row_count) {
        const Row& row = m.rows[first + mine];
        for (int k = lane; k < row.pieces; k += LANES) {
            s.p += m.partial[row.first_piece + k].p;
            s.g += m.partial[row.first_piece + k].g;
            s.third += m.partial[row.first_piece + k].third;
        }
    }
    part[mine][lane] = s;
    __syncthreads();
    if (threadIdx.x >= ROWS || first + (int)threadIdx.x >= m.row_count) return;
    s = part[threadIdx.x][0];
    for (int k = 1; k < LANES; ++k) {
        s.p += part[threadIdx.x][k].p;
        s.g += part[threadIdx.x][k].g;
        s.third += part[threadIdx.x][k].third;
    }
    if (m.third == 0 && m.weights == nullptr) s.third = s.g;  // as core.sums has it
    if (m.decides) decide(m, first + threadIdx.x, s, registers, threadIdx.x);
    else m.S[first + threadIdx.x] = s;
}

// -------------------------------------------------------------------------------------------------------------- apply

__device__ inline bool found_inf(const Model& m) { return m.found_inf != nullptr && *m.found_inf != 0; }

// Whether the step may be taken at all.
__device__ inline bool is_taken(const Model& m) {
    if (m.written != nullptr) return *m.written;
    return !m.decides || (*m.bad == 0 && !found_inf(m));
}

// p - core.difference and, without a buffer, p - core.difference_without_buffer.
template <class T> struct Map {
    T m, alpha, beta, kappa, lam, mu;

    __device__ Map(const double* c) : m((T)c[0]), alpha((T)c[1]), beta((T)c[2]), kappa((T)c[3]), lam((T)c[4]), mu((T)c[5]) {}

    __device__ T operator()(T p, T g, T& v) const {
        v = m * v + alpha * g + beta * p;
        return p - (kappa * v + lam * g + mu * p);
    }

    __device__ T operator()(T p, T g) const { return p - ((lam + kappa * alpha) * g + (mu + kappa * beta) * p); }
};

// `read` is where parameters are read from, `out`, which may be the same, where they are written to in full; `rounded` gets
// a copy, or is null.
template <class T, class P, class G, class R>
__device__ inline void write(const Part& part, const P* read, const G* g, T* v, P* out, R* rounded, const Map<T>& map) {
    bool aligned = is_aligned(read) && is_aligned(out) && is_aligned(g);
    aligned = aligned && (v == nullptr || is_aligned(v)) && (rounded == nullptr || is_aligned(rounded));
#pragma unroll 2
    for (i64 k = part.begin + WIDTH * (i64)threadIdx.x; k < part.whole; k += WIDTH * THREADS) {
        Pack<P> ps = load(read + k, aligned);
        Pack<G> gs = load(g + k, aligned);
        Pack<T> vs = {};
        Pack<R> copies;
        if (v != nullptr) vs = load(v + k, aligned);
        for (int i = 0; i < WIDTH; ++i) {
            T p = (T)wide(ps.at[i]), slope = (T)wide(gs.at[i]);
            p = v != nullptr ? map(p, slope, vs.at[i]) : map(p, slope);
            store(ps.at[i], p);
            store(copies.at[i], p);
        }
        save(out + k, ps, aligned);
        if (v != nullptr) save(v + k, vs, aligned);
        if (rounded != nullptr) save(rounded + k, copies, aligned);
    }
    i64 k = part.whole + threadIdx.x;
    if (k < part.end) {
        T p = (T)wide(read[k]), slope = (T)wide(g[k]);
        p = v != nullptr ? map(p, slope, v[k]) : map(p, slope);
        store(out[k], p);
        if (rounded != nullptr) store(rounded[k], p);
    }
}

// Of a step that is not taken, where parameters move all the same: who asked for it does not know.
template <class P> __device__ inline void copy(const Part& part, const P* p, P* out) {
    for (i64 k = part.begin + threadIdx.x; k < part.end; k += THREADS) out[k] = p[k];
}

// What follows from a step, by one block: counts, last learning rates, and which buffers are used.
__device__ inline void note(const Model& m, bool taken) {
    if (threadIdx.x == 0) {
        bool found = found_inf(m), refused = !found && *m.refusing < m.row_count;
        m.counts[taken ? 0 : refused ? 2 : 1] += 1;
        if (refused) {
            const Sums& s = m.S[*m.refusing];
            int what = !is_finite(s.g) ? BAD_GRADIENT : !is_finite(s.p) ? BAD_PARAMETER : BAD_UPDATE;
            m.counts[3] = KINDS * (i64)m.rows[*m.refusing].place + what;
        }
    }
    if (!taken) return;
    for (int i = threadIdx.x; i < m.row_count; i += THREADS) {
        if (m.rows[i].keeps) m.first[i] = false;
        m.previous_lr[i] = hyper_of(m, m.rows[i])[LR];
    }
}

// Third stage, core.apply: of `count` pieces from `first` on, one a block; `last` if the whole model is done then.
//
// Backwards, since the end of it is what `sums` has left in the cache.
template <class P, class G> __device__ inline void apply(const Model& m, int first, int count, int last) {
    typedef typename Computed<P>::type T;
    bool taken = is_taken(m);
    if (blockIdx.x == 0 && last && m.decides) note(m, taken);
    if ((!taken && m.out == nullptr) || (int)blockIdx.x >= count) return;
    Part part(m, first + count - 1 - (int)blockIdx.x);
    const G* g = reinterpret_cast<const G*>(part.g);
    Map<T> map(m.C + 6 * (i64)part.array.row);
    T* v = reinterpret_cast<T*>(part.array.v);
    T* master = reinterpret_cast<T*>(part.array.master);
    const P* p = reinterpret_cast<const P*>(part.p);
    P* out = reinterpret_cast<P*>(part.out);
    if (!taken) copy(part, p, out);
    else if (master != nullptr) write(part, master, g, v, master, out, map);
    else write(part, p, g, v, out, (P*)nullptr, map);
}

// ------------------------------------------------------------------------------------------------------------ tables

// Bring numbers to the device as arguments of a launch: nothing is waited for, and a CUDA graph keeps them.
extern "C" __global__ void __launch_bounds__(THREADS) poke(u64* places, Words words) {
    for (int i = threadIdx.x; i < words.count; i += THREADS) places[words.first + i] = words.at[i];
}
