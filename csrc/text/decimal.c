/* Nine digits are enough for float32: neighbours differ by at least 6e-8 of their size, the ninth
 * digit by at most 1e-8. So the digits come from one product in double precision, whose error of
 * 1e-15 cannot lead to another neighbour, and no long division is needed as for float64. */
#include "text/decimal.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#define DIGITS 9

/* 10^k for k = 0 ... 53: scaling up the smallest number, 1.4e-45, to nine digits takes
 * 10^(8 + 45). */
static const double powers_of_ten[] = {
    1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11, 1e12, 1e13,
    1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22, 1e23, 1e24, 1e25, 1e26, 1e27,
    1e28, 1e29, 1e30, 1e31, 1e32, 1e33, 1e34, 1e35, 1e36, 1e37, 1e38, 1e39, 1e40, 1e41,
    1e42, 1e43, 1e44, 1e45, 1e46, 1e47, 1e48, 1e49, 1e50, 1e51, 1e52, 1e53};

static double scaled(double value, int power) {
  return power >= 0 ? value * powers_of_ten[power] : value / powers_of_ten[-power];
}

static char* write_text(char* out, const char* text) {
  const size_t length = strlen(text);
  memcpy(out, text, length);
  return out + length;
}

static char* write_digits(char* out, const char* digits, int count) {
  for (int i = 0; i < count; ++i) *out++ = digits[i];
  return out;
}

static char* write_exponent(char* out, int exponent) {
  *out++ = 'e';
  *out++ = exponent < 0 ? '-' : '+';
  const int size = exponent < 0 ? -exponent : exponent;
  *out++ = (char)('0' + size / 10);
  *out++ = (char)('0' + size % 10);
  return out;
}

char* mb_write_f32(char* out, float value) {
  if (isnan(value)) return write_text(out, "nan");
  if (signbit(value)) *out++ = '-';
  if (isinf(value)) return write_text(out, "inf");
  const double size = fabs((double)value);
  if (size == 0.0) return write_text(out, "0");

  /* Of 2^binary <= size < 2^(binary + 1) follows the decimal exponent, up to one. */
  uint64_t bits;
  memcpy(&bits, &size, sizeof bits); /* no float32 is denormal as a double */
  const int binary = (int)(bits >> 52) - 1023;
  int exponent = (binary * 78913) >> 18; /* floor(binary log10(2)) */
  if (scaled(size, -exponent) >= 10.0) ++exponent;
  uint32_t number = (uint32_t)llrint(scaled(size, DIGITS - 1 - exponent));
  if (number >= 1000000000) { /* 9.999999999 was rounded up */
    number = 100000000;
    ++exponent;
  }

  char digits[DIGITS];
  for (int i = DIGITS - 1; i >= 0; --i) {
    digits[i] = (char)('0' + number % 10);
    number /= 10;
  }
  int count = DIGITS;
  while (count > 1 && digits[count - 1] == '0') --count;

  if (exponent < -4 || exponent >= DIGITS) {
    *out++ = digits[0];
    if (count > 1) *out++ = '.';
    return write_exponent(write_digits(out, digits + 1, count - 1), exponent);
  }
  if (exponent < 0) {
    out = write_text(out, "0.");
    for (int i = -1; i > exponent; --i) *out++ = '0';
    return write_digits(out, digits, count);
  }
  out = write_digits(out, digits, exponent + 1); /* zeros that were stripped included */
  if (count > exponent + 1) {
    *out++ = '.';
    out = write_digits(out, digits + exponent + 1, count - exponent - 1);
  }
  return out;
}
